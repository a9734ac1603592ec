// The operands of attention within a batch.

#ifndef PALLAS_KERNELS_FLASH_ATTENTION_CPU_OPERANDS_H_
#define PALLAS_KERNELS_FLASH_ATTENTION_CPU_OPERANDS_H_

#include <algorithm>
#include <cstdint>

namespace {

template <typename T>
struct Operands {
  const float* query;  // [batch, queries, heads, head_dim], scaled
  const T* key;        // [batch, keys, kv_heads, head_dim]
  const T* value;
  const int32_t* intervals;  // [batch, queries, 2]
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  float softcap;  // 0: none

  int64_t group() const { return heads / kv_heads; }
  // The keys that a query sees.
  int64_t Low(int64_t sequence, int64_t row) const { return Bound(sequence, row, 0); }
  int64_t High(int64_t sequence, int64_t row) const { return Bound(sequence, row, 1); }
  int64_t Bound(int64_t sequence, int64_t row, int64_t side) const {
    return std::clamp<int64_t>(intervals[(sequence * queries + row) * 2 + side], 0, keys);
  }
};

}  // namespace

#endif  // PALLAS_KERNELS_FLASH_ATTENTION_CPU_OPERANDS_H_
