// Attention of query rows to a paged cache, on CPUs: `pallas_kernels.paged_attention.segments` says what is computed.
//
// A segment of one row, as in decoding, reads each key and value once, from where it lies, for all heads. One of
// several rows, as a prefill or a shared prefix, is cut into tiles of rows, which meet blocks of keys as matrices.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu_parallel.h"
#include "cpu_plan.h"
#include "cpu_vector.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Tokens whose logits are held at once: a multiple of the lanes and of the values that are added at once.
constexpr int kBlock = 64, kValues = 8;
// Of a tile, the query vectors, and the vectors of each, whose sums are in registers at once.
constexpr int kRows = 6, kWide = kLanes == 16 ? 4 : 2;
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

// Where the next tokens lie. What is computed for more than there are is computed for the last of them, and replaced.
template <typename T>
struct Block {
  int64_t count;
  const T* key[kBlock];  // of the first kv head
  const T* value[kBlock];
  int64_t scale[kBlock];

  Block(const Cache<T>& cache, const int32_t* table, int64_t begin, int64_t end)
      : count(std::min<int64_t>(kBlock, end - begin)) {
    int64_t at = begin / cache.page_size, offset = begin % cache.page_size;
    for (int64_t t = 0; t < count; ++t, ++offset) {
      if (offset == cache.page_size) ++at, offset = 0;
      // A page that is not there would end the process.
      const int64_t page = std::clamp<int64_t>(table[at], 0, cache.pages - 1);
      const int64_t place = (page * cache.page_size + offset) * cache.kv_heads * cache.head_dim;
      key[t] = cache.key + place;
      value[t] = cache.value + place;
      scale[t] = page * cache.kv_heads * cache.page_size + offset;
    }
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
      // softcap * tanh(logit / softcap)
      const Vector twice = Exp(Load(row + i) * (2.0f / cache.softcap));
      Store(row + i, cache.softcap * (1.0f - 2.0f / (twice + 1.0f)));
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
    const Block<T> block(cache, table, begin, high);
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

// Adds values, `wide` vectors of each, times the weights of kRows query vectors; totals are [kRows][head_dim].
template <int wide>
inline void TileAccumulate(const float* weights, const float* const* value, int64_t count, int64_t offset,
                           int64_t head_dim, float* total) {
  Vector sum[kRows][wide];
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < wide; ++w) sum[r][w] = Load(total + r * head_dim + w * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int w = 0; w < wide; ++w) {
      const Vector v = Load(value[t] + offset + w * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][w] += weights[r * kBlock + t] * v;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int w = 0; w < wide; ++w) Store(total + r * head_dim + w * kLanes, sum[r][w]);
  }
}

// A tile: query vectors of one kv head, of which vector v sees tokens low[v] <= j < high[v].
struct Tile {
  std::vector<const float*> query;
  std::vector<int64_t> low, high;
};

// Adds what a tile sees to its state, whose vectors are a multiple of kRows.
template <typename T>
void AttendTile(const Cache<T>& cache, const Tile& tile, const int32_t* table, int64_t head, const State& state) {
  const int64_t head_dim = cache.head_dim, vectors = tile.query.size(), offset = head * head_dim;
  thread_local std::vector<float> logits, keys, values;
  logits.resize(vectors * kBlock);
  keys.resize(head_dim * kBlock);
  values.resize(head_dim * kBlock);
  const int64_t low = *std::min_element(tile.low.begin(), tile.low.end());
  const int64_t high = *std::max_element(tile.high.begin(), tile.high.end());
  for (int64_t begin = low; begin < high; begin += kBlock) {
    const Block<T> block(cache, table, begin, high);
    const float* value[kBlock];
    for (int64_t t = 0; t < kBlock; ++t) {
      for (int64_t i = 0; i < head_dim; i += kLanes) Store(&values[t * head_dim + i], Load(block.key[t] + offset + i));
    }
    for (int64_t i = 0; i < head_dim; ++i) {
      for (int64_t t = 0; t < kBlock; ++t) keys[i * kBlock + t] = values[t * head_dim + i];
    }
    for (int64_t v = 0; v < vectors; v += kRows) {
      for (int64_t t = 0; t < block.count; t += kWide * kLanes) {
        TileProducts(&tile.query[v], &keys[t], head_dim, &logits[v * kBlock + t]);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t from = std::clamp<int64_t>(tile.low[v] - begin, 0, block.count);
      const int64_t to = std::clamp<int64_t>(tile.high[v] - begin, from, block.count);
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
      int64_t i = 0;
      const auto accumulate = [&](auto wide) {
        for (; i + wide() * kLanes <= head_dim; i += wide() * kLanes) {
          TileAccumulate<wide()>(&logits[v * kBlock], value, block.count, i, head_dim, state.total + v * head_dim + i);
        }
      };
      accumulate(std::integral_constant<int, kWide>());
      accumulate(std::integral_constant<int, 1>());
    }
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

// The result of several rows, for the query heads of one kv head.
template <typename T>
void AttendRows(const Cache<T>& cache, const Operands& x, const Part& part) {
  thread_local Tile tile;
  thread_local std::vector<float> memory;
  const int64_t heads = cache.heads(), head_dim = cache.head_dim, s = part.segment;
  const int64_t vectors = part.rows * cache.group, padded = (vectors + kRows - 1) / kRows * kRows;
  const auto place = [&](int64_t row, int64_t v) { return row * heads + part.head * cache.group + v % cache.group; };
  tile.query.resize(padded);
  tile.low.resize(padded);
  tile.high.resize(padded);
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t v = std::min(i, vectors - 1), row = part.row + v / cache.group;
    tile.query[i] = x.query + place(row, v) * head_dim;
    tile.low[i] = x.Low(s, row);
    tile.high[i] = x.High(s, row);
  }
  memory.resize(State::Size(padded, head_dim));
  const State state = State::Nothing(memory.data(), padded, head_dim);
  AttendTile(cache, tile, x.Pages(s), part.head, state);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t to = place(x.out_begin[s] + part.row - x.query_begin[s] + v / cache.group, v);
    x.lse[to] = Finish(&state, 1, v, head_dim, x.out + to * head_dim);
  }
}

template <typename T>
void AttendSegments(ffi::ThreadPool& pool, const Cache<T>& cache, const Operands& x) {
  const int64_t heads = cache.heads(), head_dim = cache.head_dim, size = State::Size(heads, head_dim);
  const Plan plan(x, cache.kv_heads, cache.group, pool.num_threads());
  std::vector<State> states(plan.first.back());
  std::unique_ptr<float[]> memory(new float[states.size() * size]);
  const auto finish = [&](int64_t s) {
    const int64_t first = plan.first[s], count = plan.first[s + 1] - first;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t to = x.out_begin[s] * heads + head;
      x.lse[to] = Finish(&states[first], count, head, head_dim, x.out + to * head_dim);
    }
  };
  const auto states_of = [&](int64_t s) { return plan.first[s + 1] - plan.first[s]; };
  InParallel(pool, plan.parts.size(), [&](int64_t i) {
    const Part& part = plan.parts[i];
    if (states_of(part.segment) == 0) return AttendRows(cache, x, part);
    State& state = states[part.state];
    state = State::Nothing(memory.get() + part.state * size, heads, head_dim);
    AttendRow(cache, x.query + part.row * heads * head_dim, x.Pages(part.segment), part.low, part.high, state);
    if (states_of(part.segment) == 1) finish(part.segment);
  });
  for (int64_t s = 0; s < x.segments; ++s) {
    if (states_of(s) > 1) finish(s);
  }
}

// Operands: query [rows, heads, head_dim], scaled; position [rows]; key and value [layers, pages, page_size, kv_heads,
// head_dim]; layer; block_table [sequences, pages_per_sequence]; segments [6, segments], in the order of the fields of
// `Segments`; window; and key_scale and value_scale [layers, pages, kv_heads, page_size] of a quantized cache.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::S32> position, ffi::AnyBuffer key,
                  ffi::AnyBuffer value, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> block_table,
                  ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::S32> window, ffi::RemainingArgs scales,
                  float softcap, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse) {
  const auto shape = key.dimensions();
  const int64_t index = std::clamp<int64_t>(layer.typed_data()[0], 0, shape[0] - 1);
  const int64_t pages = shape[1], page_size = shape[2], kv_heads = shape[3], head_dim = shape[4];
  const float* scale[2] = {nullptr, nullptr};
  for (size_t i = 0; i < scales.size(); ++i) {
    auto given = scales.get<ffi::Buffer<ffi::F32>>(i);
    if (!given.has_value()) return given.error();
    scale[i] = given->typed_data() + index * pages * kv_heads * page_size;
  }
  Operands x;
  x.query = query.typed_data();
  x.position = position.typed_data();
  x.table = block_table.typed_data();
  x.rows = query.dimensions()[0];
  x.table_rows = block_table.dimensions()[0];
  x.table_width = block_table.dimensions()[1];
  x.segments = segments.dimensions()[1];
  x.outputs = out->dimensions()[0];
  x.window = window.typed_data()[0];
  x.page_size = page_size;
  x.out = out->typed_data();
  x.lse = lse->typed_data();
  const int32_t** fields[] = {&x.query_begin, &x.query_count, &x.table_row, &x.kv_begin, &x.kv_end, &x.out_begin};
  for (int64_t i = 0; i < 6; ++i) *fields[i] = segments.typed_data() + i * x.segments;
  const auto attend = [&](auto zero) {
    using T = decltype(zero);
    const int64_t start = index * pages * page_size * kv_heads * head_dim;
    const Cache<T> cache = {static_cast<const T*>(key.untyped_data()) + start,
                            static_cast<const T*>(value.untyped_data()) + start,
                            scale[0],
                            scale[1],
                            pages,
                            page_size,
                            kv_heads,
                            query.dimensions()[1] / kv_heads,
                            head_dim,
                            softcap};
    AttendSegments(pool, cache, x);
    return ffi::Error::Success();
  };
  switch (key.element_type()) {
    case ffi::F32:
      return attend(float{});
    case ffi::BF16:
      return attend(BFloat16{});
    case ffi::S8:
      return attend(int8_t{});
    case ffi::F8E4M3FN:
      return attend(Float8{});
    default:
      return ffi::Error::InvalidArgument("the cache has a type that this kernel does not read");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
