// Products of small matrices whose sums stay in registers.

#ifndef PALLAS_KERNELS_CPU_MATRIX_H_
#define PALLAS_KERNELS_CPU_MATRIX_H_

#include <cstdint>
#include <type_traits>

#include "cpu/vector.h"

namespace {

// Tokens whose logits are held at once: a multiple of the lanes.
constexpr int kBlock = 64;
// Rows whose sums are in registers at once, and vectors of each.
constexpr int64_t kRows = 6;
constexpr int kWide = kLanes == 16 ? 4 : 2;

// Turns kBlock rows of head_dim into columns [head_dim][kBlock].
template <typename T>
inline void Columns(const T* const* row, int64_t offset, int64_t head_dim, float* columns) {
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    for (int t = 0; t < kBlock; t += kLanes) {
      Vector square[kLanes];
      for (int j = 0; j < kLanes; ++j) square[j] = Load(row[t + j] + offset + i);
      Transpose(square);
      for (int j = 0; j < kLanes; ++j) Store(columns + (i + j) * kBlock + t, square[j]);
    }
  }
}

// Products of kRows query vectors with kWide vectors of tokens; keys are [head_dim][kBlock], logits [kRows][kBlock].
inline void TileProducts(const float* const* query, const float* key, int64_t head_dim, float* logits) {
  Vector sum[kRows][kWide] = {};
  for (int64_t i = 0; i < head_dim; ++i) {
    for (int w = 0; w < kWide; ++w) {
      const Vector k = Load(key + i * kBlock + w * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][w] += query[r][i] * k;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < kWide; ++w) Store(logits + r * kBlock + w * kLanes, sum[r][w]);
  }
}

// Adds `wide` vectors of each of `count` values, times the weights of kRows rows, to totals [kRows][head_dim]. The
// weight of row r for value t is weights[r * row + t * step]. A row that sees none keeps its bits, and no other's are a
// negative zero, whose sign would tell of tokens that are not seen.
template <int wide, int64_t row, int64_t step>
inline void AccumulateSlice(const float* weights, const bool* sees, const float* const* value, int64_t count,
                            int64_t offset, int64_t head_dim, float* total) {
  Vector sum[kRows][wide];
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < wide; ++w) sum[r][w] = Load(total + r * head_dim + w * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int w = 0; w < wide; ++w) {
      const Vector v = Load(value[t] + offset + w * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][w] += weights[r * row + t * step] * v;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (!sees[r]) continue;
    for (int w = 0; w < wide; ++w) Store(total + r * head_dim + w * kLanes, sum[r][w] + 0.0f);
  }
}

// The same for whole values.
template <int64_t row, int64_t step>
inline void TileAccumulate(const float* weights, const bool* sees, const float* const* value, int64_t count,
                           int64_t head_dim, float* total) {
  int64_t i = 0;
  const auto add = [&](auto wide) {
    for (; i + wide() * kLanes <= head_dim; i += wide() * kLanes) {
      AccumulateSlice<wide(), row, step>(weights, sees, value, count, i, head_dim, total + i);
    }
  };
  add(std::integral_constant<int, kWide>());
  if constexpr (kWide > 2) add(std::integral_constant<int, 2>());
  add(std::integral_constant<int, 1>());
}

}  // namespace

#endif  // PALLAS_KERNELS_CPU_MATRIX_H_
