// The softmax over blocks of cached tokens, as far as it has come.

#ifndef PALLAS_KERNELS_CPU_SOFTMAX_H_
#define PALLAS_KERNELS_CPU_SOFTMAX_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/matrix.h"
#include "cpu/vector.h"

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// One layer's cache, and the shapes.
template <typename T>
struct Cache {
  const T* key;  // [pages, page_size, kv_heads, head_dim]
  const T* value;
  const float* key_scale;  // [pages, kv_heads, page_size], or null
  const float* value_scale;
  int64_t pages, page_size, kv_heads, group, head_dim;
  float softcap;  // 0: none

  int64_t heads() const { return kv_heads * group; }
};

// An unfinished softmax of some query vectors.
struct State {
  float* total;   // [vectors, head_dim]
  float* weight;  // [vectors]
  float* peak;    // [vectors]

  static int64_t Size(int64_t vectors, int64_t head_dim) { return vectors * (head_dim + 2); }

  static State Nothing(float* memory, int64_t vectors, int64_t head_dim) {
    const int64_t size = vectors * head_dim;
    std::fill(memory, memory + size + vectors, 0.0f);
    std::fill(memory + size + vectors, memory + size + 2 * vectors, kNothing);
    return {memory, memory + size, memory + size + vectors};
  }
};

// Where tokens begin <= j < end lie. What is computed for those before `low`, and for more than there are, is computed
// for another, and replaced.
template <typename T>
struct Block {
  int64_t count;
  const T* key[kBlock];  // of the first kv head
  const T* value[kBlock];
  int64_t scale[kBlock];

  Block(const Cache<T>& cache, const int32_t* table, int64_t begin, int64_t end, int64_t low) : count(end - begin) {
    const int64_t skipped = std::max<int64_t>(low - begin, 0);
    int64_t at = (begin + skipped) / cache.page_size, offset = (begin + skipped) % cache.page_size;
    for (int64_t t = skipped; t < count; ++t, ++offset) {
      if (offset == cache.page_size) ++at, offset = 0;
      // A page that is not there would end the process.
      const int64_t page = std::clamp<int64_t>(table[at], 0, cache.pages - 1);
      const int64_t place = (page * cache.page_size + offset) * cache.kv_heads * cache.head_dim;
      key[t] = cache.key + place;
      value[t] = cache.value + place;
      scale[t] = page * cache.kv_heads * cache.page_size + offset;
    }
    std::fill(key, key + skipped, key[skipped]);
    std::fill(value, value + skipped, value[skipped]);
    std::fill(key + count, key + kBlock, key[count - 1]);
    std::fill(value + count, value + kBlock, value[count - 1]);
  }
};

// Makes logits of a block's tokens low <= t < high into weights of their values, and scales what was summed so far.
template <typename T>
inline void Weigh(const Cache<T>& cache, const Block<T>& block, int64_t head, int64_t low, int64_t high, float* row,
                  const State& state, int64_t vector) {
  const int64_t offset = head * cache.page_size;
  if (cache.key_scale != nullptr) {
    for (int64_t t = low; t < high; ++t) row[t] *= cache.key_scale[block.scale[t] + offset];
  }
  if (cache.softcap != 0) {
    for (int i = 0; i < kBlock; i += kLanes) {
      Store(row + i, cache.softcap * Tanh(Load(row + i) * (1.0f / cache.softcap)));
    }
  }
  std::fill(row, row + low, kNothing);
  std::fill(row + high, row + kBlock, kNothing);
  Vector largest = Vector{} + state.peak[vector];
  for (int i = 0; i < kBlock; i += kLanes) largest = Max(largest, Load(row + i));
  const float peak = Largest(largest);
  if (low >= high || peak == kNothing) {
    std::fill(row, row + kBlock, 0.0f);
    return;
  }
  Vector sum{};
  for (int i = 0; i < kBlock; i += kLanes) {
    const Vector weight = Exp(Load(row + i) - peak);
    sum += weight;
    Store(row + i, weight);
  }
  std::fill(row, row + low, 0.0f);
  std::fill(row + high, row + kBlock, 0.0f);
  const float decay = state.peak[vector] == peak ? 1.0f : std::exp(state.peak[vector] - peak);
  state.weight[vector] = state.weight[vector] * decay + Sum(sum);
  state.peak[vector] = peak;
  if (decay != 1.0f) {
    float* total = state.total + vector * cache.head_dim;
    for (int64_t i = 0; i < cache.head_dim; i += kLanes) Store(total + i, Load(total + i) * decay);
  }
  if (cache.value_scale != nullptr) {
    for (int64_t t = low; t < high; ++t) row[t] *= cache.value_scale[block.scale[t] + offset];
  }
}

// Joins the states that parts of the tokens left of a query vector, and divides by the weights; returns the
// log-sum-exp.
float Finish(const State* parts, int64_t count, int64_t vector, int64_t head_dim, float* out) {
  float peak = kNothing, weight = 0;
  for (int64_t p = 0; p < count; ++p) peak = std::max(peak, parts[p].peak[vector]);
  std::fill(out, out + head_dim, 0.0f);
  if (peak == kNothing) return kNothing;
  for (int64_t p = 0; p < count; ++p) weight += parts[p].weight[vector] * std::exp(parts[p].peak[vector] - peak);
  for (int64_t p = 0; p < count; ++p) {
    const float share = std::exp(parts[p].peak[vector] - peak) / weight;
    const float* total = parts[p].total + vector * head_dim;
    for (int64_t i = 0; i < head_dim; i += kLanes) Store(out + i, Load(out + i) + share * Load(total + i));
  }
  return peak + std::log(weight);
}

}  // namespace

#endif  // PALLAS_KERNELS_CPU_SOFTMAX_H_
