// Several rows at once: matrices of query vectors and of keys.

#ifndef PALLAS_KERNELS_CPU_TILES_H_
#define PALLAS_KERNELS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/softmax.h"
#include "cpu/vector.h"

namespace {

// Most query vectors of a tile.
constexpr int64_t kTile = 96;

// Rows of each tile of `count` rows of `group` vectors: tiles of equally many, whose vectors fill registers.
inline int64_t RowsOfTile(int64_t count, int64_t group) {
  const int64_t largest = std::max<int64_t>(kTile / group, 1), full = kRows / std::gcd(kRows, group);
  const int64_t tiles = (count + largest - 1) / largest;
  return ((count + tiles - 1) / tiles + full - 1) / full * full;
}

// A tile: query vectors of one kv head, a multiple of kRows, of which vector v sees tokens low[v] <= j < high[v].
struct Tile {
  std::vector<const float*> query;
  std::vector<int64_t> low, high;

  void Resize(int64_t vectors) {
    query.resize(vectors);
    low.resize(vectors);
    high.resize(vectors);
  }
};

// Adds what a tile sees to its state. With `cut`, blocks begin where they would for any other tile, so that a vector's
// bits do not depend on the others.
template <typename T>
void AttendTile(const Cache<T>& cache, const Tile& tile, const int32_t* table, int64_t head, int64_t cut,
                const State& state) {
  const int64_t head_dim = cache.head_dim, vectors = tile.query.size(), offset = head * head_dim;
  thread_local std::vector<float> logits, keys, values;
  logits.resize(vectors * kBlock);
  keys.resize(head_dim * kBlock);
  values.resize(head_dim * kBlock);
  std::unique_ptr<bool[]> sees(new bool[vectors]);
  int64_t low = std::numeric_limits<int64_t>::max(), high = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    if (tile.low[v] >= tile.high[v]) continue;
    low = std::min(low, tile.low[v]);
    high = std::max(high, tile.high[v]);
  }
  if (low >= high) return;
  const int64_t first = cut ? low / cut * cut + low % cut / kBlock * kBlock : low;
  for (int64_t begin = first, next; begin < high; begin = next) {
    next = begin + kBlock;
    if (cut) next = std::min(next, (begin / cut + 1) * cut);
    const Block<T> block(cache, table, begin, std::min(next, high), low);
    const float* value[kBlock];
    Columns(block.key, offset, head_dim, keys.data());
    for (int64_t v = 0; v < vectors; v += kRows) {
      for (int64_t t = 0; t < block.count; t += kWide * kLanes) {
        TileProducts(&tile.query[v], &keys[t], head_dim, &logits[v * kBlock + t]);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t from = std::clamp<int64_t>(tile.low[v] - begin, 0, block.count);
      const int64_t to = std::clamp<int64_t>(tile.high[v] - begin, from, block.count);
      sees[v] = from < to;
      Weigh(cache, block, head, from, to, &logits[v * kBlock], state, v);
    }
    for (int64_t t = 0; t < block.count; ++t) {
      if constexpr (std::is_same_v<T, float>) {
        value[t] = block.value[t] + offset;
      } else {
        value[t] = &values[t * head_dim];
        for (int64_t i = 0; i < head_dim; i += kLanes) {
          Store(&values[t * head_dim + i], Load(block.value[t] + offset + i));
        }
      }
    }
    for (int64_t v = 0; v < vectors; v += kRows) {
      TileAccumulate<kBlock, 1>(&logits[v * kBlock], &sees[v], value, block.count, head_dim,
                                state.total + v * head_dim);
    }
  }
}

}  // namespace

#endif  // PALLAS_KERNELS_CPU_TILES_H_
