// The backward pass, one query head at a time, whose gradients are added up in a fixed order.

#ifndef PALLAS_KERNELS_FLASH_ATTENTION_CPU_BACKWARD_H_
#define PALLAS_KERNELS_FLASH_ATTENTION_CPU_BACKWARD_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/vector.h"
#include "cpu_operands.h"

namespace {

// Queries of a tile: all of a block's tokens, and so many more that they are a multiple of kRows.
constexpr int64_t kPadded = (kBlock + kRows - 1) / kRows * kRows;

// What the backward pass has for each query.
struct RowOperands {
  const float* lse;  // [batch, queries, heads]
  const float* delta;
  const float* out_gradient;  // [batch, queries, heads, head_dim]
};

struct Gradients {
  float* query;  // [batch, queries, heads, head_dim]
  float* key;    // [batch, keys, heads, head_dim]
  float* value;
};

// Makes a query's logits of a block into its weights, and the products of its output's gradient and the values into the
// gradients of the logits. It sees tokens low <= t < high of them.
inline void DifferentiateRow(float lse, float delta, float softcap, int64_t low, int64_t high, float* logits,
                             float* products) {
  for (int i = 0; i < kBlock && low < high; i += kLanes) {
    Vector logit = Load(logits + i), slope = Vector{} + 1.0f;
    if (softcap != 0) {
      const Vector bounded = Tanh(logit * (1.0f / softcap));
      logit = bounded * softcap;
      slope = 1.0f - bounded * bounded;
    }
    const Vector weight = Exp(logit - lse);
    Store(logits + i, weight);
    Store(products + i, weight * (Load(products + i) - delta) * slope);
  }
  for (float* x : {logits, products}) {
    std::fill(x, x + low, 0.0f);
    std::fill(x + high, x + kBlock, 0.0f);
  }
}

// A block of keys and of values as the products want them.
struct KeyBlock {
  std::vector<float> key, key_columns, value_columns;  // [kBlock, head_dim], and transposed
  const float* row[kBlock];                            // of the keys

  template <typename T>
  void Read(const Operands<T>& x, int64_t sequence, int64_t head, int64_t begin, int64_t count) {
    const int64_t d = x.head_dim;
    for (auto* memory : {&key, &key_columns, &value_columns}) memory->resize(kBlock * d);
    const T *keys[kBlock], *values[kBlock];
    for (int64_t t = 0; t < kBlock; ++t) {
      // Those beyond the last stand for nothing, but must be numbers.
      const int64_t from = ((sequence * x.keys + begin + std::min(t, count - 1)) * x.kv_heads + head) * d;
      keys[t] = x.key + from;
      values[t] = x.value + from;
      row[t] = &key[t * d];
      for (int64_t i = 0; i < d; i += kLanes) Store(&key[t * d + i], Load(keys[t] + i));
    }
    Columns(keys, 0, d, key_columns.data());
    Columns(values, 0, d, value_columns.data());
  }
};

// Queries that are done at once.
struct QueryTile {
  int64_t rows = 0, low = std::numeric_limits<int64_t>::max(), high = 0;  // what any of them sees
  const float* query[kPadded];
  const float* out_gradient[kPadded];

  template <typename T>
  QueryTile(const Operands<T>& x, const RowOperands& of_rows, int64_t sequence, int64_t head, int64_t first)
      : rows(std::min(kPadded, x.queries - first)) {
    for (int64_t r = 0; r < kPadded; ++r) {
      const int64_t row = first + std::min(r, rows - 1);
      const int64_t from = ((sequence * x.queries + row) * x.heads + head) * x.head_dim;
      query[r] = x.query + from;
      out_gradient[r] = of_rows.out_gradient + from;
      if (x.Low(sequence, row) >= x.High(sequence, row)) continue;
      low = std::min(low, x.Low(sequence, row));
      high = std::max(high, x.High(sequence, row));
    }
  }
};

template <typename T>
void BackwardHead(const Operands<T>& x, const RowOperands& of_rows, int64_t sequence, int64_t head,
                  const Gradients& gradients) {
  const int64_t d = x.head_dim;
  thread_local KeyBlock keys;
  thread_local std::vector<float> dquery, dkey, dvalue, weights, dlogits;
  thread_local std::vector<QueryTile> tiles;
  tiles.clear();
  for (int64_t first = 0; first < x.queries; first += kPadded) tiles.emplace_back(x, of_rows, sequence, head, first);
  dquery.assign(tiles.size() * kPadded * d, 0.0f);
  // Reading the weights of tokens, kRows at a time, goes beyond the last.
  weights.resize((kPadded + 1) * kBlock);
  dlogits.resize((kPadded + 1) * kBlock);
  bool sees[kRows];
  std::fill(sees, sees + kRows, true);
  const auto copy = [&](const float* from, float* to, int64_t length, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(from + i * d, d, to + ((sequence * length + first + i) * x.heads + head) * d);
    }
  };
  for (int64_t begin = 0; begin < x.keys; begin += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, x.keys - begin);
    keys.Read(x, sequence, head / x.group(), begin, count);
    dkey.assign(kPadded * d, 0.0f);
    dvalue.assign(kPadded * d, 0.0f);
    for (size_t i = 0; i < tiles.size(); ++i) {
      const QueryTile& tile = tiles[i];
      if (tile.low >= begin + count || tile.high <= begin) continue;
      const int64_t rows = (tile.rows + kRows - 1) / kRows * kRows;
      for (int64_t r = 0; r < rows; r += kRows) {
        for (int64_t t = 0; t < count; t += kWide * kLanes) {
          TileProducts(&tile.query[r], &keys.key_columns[t], d, &weights[r * kBlock + t]);
          TileProducts(&tile.out_gradient[r], &keys.value_columns[t], d, &dlogits[r * kBlock + t]);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = i * kPadded + std::min(r, tile.rows - 1);
        const int64_t at = (sequence * x.queries + row) * x.heads + head;
        const int64_t low = std::clamp<int64_t>(x.Low(sequence, row) - begin, 0, count);
        const int64_t high = r < tile.rows ? std::clamp<int64_t>(x.High(sequence, row) - begin, low, count) : low;
        DifferentiateRow(of_rows.lse[at], of_rows.delta[at], x.softcap, low, high, &weights[r * kBlock],
                         &dlogits[r * kBlock]);
      }
      for (int64_t r = 0; r < rows; r += kRows) {
        TileAccumulate<kBlock, 1>(&dlogits[r * kBlock], sees, keys.row, count, d, &dquery[(i * kPadded + r) * d]);
      }
      for (int64_t t = 0; t < count; t += kRows) {
        TileAccumulate<1, kBlock>(&dlogits[t], sees, tile.query, tile.rows, d, &dkey[t * d]);
        TileAccumulate<1, kBlock>(&weights[t], sees, tile.out_gradient, tile.rows, d, &dvalue[t * d]);
      }
    }
    copy(dkey.data(), gradients.key, x.keys, begin, count);
    copy(dvalue.data(), gradients.value, x.keys, begin, count);
  }
  copy(dquery.data(), gradients.query, x.queries, 0, x.queries);
}

}  // namespace

#endif  // PALLAS_KERNELS_FLASH_ATTENTION_CPU_BACKWARD_H_
