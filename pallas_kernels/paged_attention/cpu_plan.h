// How the segments are cut into parts, each of which one thread does at once.

#ifndef PALLAS_KERNELS_PAGED_ATTENTION_CPU_PLAN_H_
#define PALLAS_KERNELS_PAGED_ATTENTION_CPU_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/tiles.h"

namespace {

// A long segment of one row is cut, to have several parts for each thread, so that none is left with the last for long.
constexpr int64_t kShortestPart = 128, kPartsPerThread = 4;

// The operands: see `Attend`.
struct Operands {
  const float* query;
  const int32_t* position;
  const int32_t* table;
  const int32_t *query_begin, *query_count, *table_row, *kv_begin, *kv_end, *out_begin;  // of each segment
  int64_t rows, table_rows, table_width, segments, outputs, window, page_size;
  int64_t cut;  // ordered: blocks of tokens do not cross multiples of this; 0: not ordered
  float* out;   // or, ordered, the sum so far
  float* lse;   // or the weight
  float* peak;  // ordered

  // Whether a segment has work; one with numbers beyond the arrays, which would end the process, has not.
  bool Valid(int64_t s) const {
    const int64_t count = query_count[s];
    return count > 0 && query_begin[s] >= 0 && query_begin[s] + count <= rows && out_begin[s] >= 0 &&
           out_begin[s] + count <= outputs;
  }
  // The tokens that a row of a segment sees.
  int64_t Low(int64_t s, int64_t row) const { return std::max<int64_t>({kv_begin[s], position[row] - window + 1, 0}); }
  int64_t High(int64_t s, int64_t row) const {
    return std::min<int64_t>({kv_end[s], int64_t{position[row]} + 1, table_width * page_size});
  }
  const int32_t* Pages(int64_t s) const {
    return table + std::clamp<int64_t>(table_row[s], 0, table_rows - 1) * table_width;
  }
};

// What a thread does at once: tokens low <= j < high of a segment's only row, or a tile of its rows and one kv head. If
// ordered, tiles alone.
struct Part {
  int64_t segment, row, rows, head, low, high;
  int64_t state;  // of an only row: where it is left
};

// The parts of all segments, and the first of each segment's states.
struct Plan {
  std::vector<Part> parts;
  std::vector<int64_t> first{0};

  Plan(const Operands& x, int64_t kv_heads, int64_t group, int64_t threads) {
    int64_t tokens = 0;
    for (int64_t s = 0; s < x.segments; ++s) {
      if (!x.Valid(s) || x.query_count[s] != 1 || x.cut) continue;
      tokens += std::max<int64_t>(x.High(s, x.query_begin[s]) - x.Low(s, x.query_begin[s]), 0);
    }
    const int64_t even = tokens / std::max<int64_t>(kPartsPerThread * threads, 1);
    const int64_t most = std::max((even + kShortestPart - 1) / kShortestPart * kShortestPart, kShortestPart);
    int64_t states = 0;
    for (int64_t s = 0; s < x.segments; ++s) {
      const int64_t row = x.query_begin[s], count = x.query_count[s];
      if (x.Valid(s) && count == 1 && !x.cut) {
        const int64_t high = x.High(s, row);
        int64_t low = x.Low(s, row);
        do {
          parts.push_back({s, row, 1, 0, low, std::min(low + most, high), states++});
          low += most;
        } while (low < high);
      } else if (x.Valid(s)) {
        // The last tiles, which see most under a causal mask, first.
        const int64_t tile = RowsOfTile(count, group);
        for (int64_t i = (count - 1) / tile * tile; i >= 0; i -= tile) {
          for (int64_t head = 0; head < kv_heads; ++head) {
            parts.push_back({s, row + i, std::min(tile, count - i), head, 0, 0, 0});
          }
        }
      }
      first.push_back(states);
    }
  }
};

}  // namespace

#endif  // PALLAS_KERNELS_PAGED_ATTENTION_CPU_PLAN_H_
