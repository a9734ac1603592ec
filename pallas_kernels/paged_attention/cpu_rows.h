// Rows that are alone: all heads of one against each key and value, from where it lies.

#ifndef PALLAS_KERNELS_PAGED_ATTENTION_CPU_ROWS_H_
#define PALLAS_KERNELS_PAGED_ATTENTION_CPU_ROWS_H_

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/softmax.h"
#include "cpu/vector.h"

namespace {

// Values that are added at once; kBlock is a multiple.
constexpr int kValues = 8;

// The products of `heads` query heads with the next kLanes / heads keys; logits are [heads][kBlock].
template <int heads, typename T>
inline void Products(const float* query, int64_t head_dim, const T* const* key, int64_t offset, float* logits) {
  constexpr int tokens = kLanes / heads;
  Vector sum[kLanes] = {};
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    Vector k[tokens];
    for (int t = 0; t < tokens; ++t) k[t] = Load(key[t] + offset + i);
    for (int h = 0; h < heads; ++h) {
      const Vector q = Load(query + h * head_dim + i);
      for (int t = 0; t < tokens; ++t) sum[h * tokens + t] += q * k[t];
    }
  }
  float sums[kLanes];
  Store(sums, SumEach(sum));
  for (int h = 0; h < heads; ++h) std::copy_n(sums + h * tokens, tokens, logits + h * kBlock);
}

// Adds kValues values, each times its weight; weights are [heads][kBlock].
template <int heads, typename T>
inline void Accumulate(const float* weights, int64_t head_dim, const T* const* value, int64_t offset, float* total) {
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    Vector v[kValues];
    for (int t = 0; t < kValues; ++t) v[t] = Load(value[t] + offset + i);
    for (int h = 0; h < heads; ++h) {
      Vector sum = Load(total + h * head_dim + i);
      for (int t = 0; t < kValues; ++t) sum += weights[h * kBlock + t] * v[t];
      Store(total + h * head_dim + i, sum);
    }
  }
}

// Calls `work` with the first head and the number of heads (1, 2 or 4) of parts of a group.
template <typename Work>
inline void ForHeads(int64_t group, const Work& work) {
  int64_t head = 0;
  for (; head + 4 <= group; head += 4) work(head, std::integral_constant<int, 4>());
  if (group - head >= 2) work(head, std::integral_constant<int, 2>()), head += 2;
  if (group - head >= 1) work(head, std::integral_constant<int, 1>());
}

// Adds tokens low <= j < high of the pages in `table` to the state of one row's heads.
template <typename T>
void AttendRow(const Cache<T>& cache, const float* query, const int32_t* table, int64_t low, int64_t high,
               const State& state) {
  const int64_t head_dim = cache.head_dim;
  thread_local std::vector<float> logits;
  logits.resize(cache.heads() * kBlock);
  for (int64_t begin = low; begin < high; begin += kBlock) {
    const Block<T> block(cache, table, begin, std::min(begin + kBlock, high), low);
    for (int64_t first = 0; first < block.count; first += kLanes) {
      for (int64_t h = 0; h < cache.kv_heads; ++h) {
        ForHeads(cache.group, [&](int64_t g, auto some) {
          const int64_t head = h * cache.group + g;
          for (int64_t t = first; t < first + kLanes; t += kLanes / some()) {
            float* to = &logits[head * kBlock + t];
            Products<some()>(query + head * head_dim, head_dim, block.key + t, h * head_dim, to);
          }
        });
      }
    }
    for (int64_t head = 0; head < cache.heads(); ++head) {
      Weigh(cache, block, head / cache.group, 0, block.count, &logits[head * kBlock], state, head);
    }
    for (int64_t t = 0; t < block.count; t += kValues) {
      for (int64_t h = 0; h < cache.kv_heads; ++h) {
        ForHeads(cache.group, [&](int64_t g, auto some) {
          const int64_t head = h * cache.group + g;
          const float* weights = &logits[head * kBlock + t];
          Accumulate<some()>(weights, head_dim, block.value + t, h * head_dim, state.total + head * head_dim);
        });
      }
    }
  }
}

}  // namespace

#endif  // PALLAS_KERNELS_PAGED_ATTENTION_CPU_ROWS_H_
