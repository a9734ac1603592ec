// Attention of query rows to a paged cache, on CPUs: `pallas_kernels.paged_attention.segments` says what is computed.
//
// A segment of one row, as in decoding, reads each key and value once, from where it lies, for all heads. One of
// several rows, as a prefill or a shared prefix, is cut into tiles of rows, which meet blocks of keys as matrices.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "cpu_plan.h"
#include "cpu_rows.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// The result of several rows, for the query heads of one kv head.
template <typename T>
void AttendRows(const Cache<T>& cache, const Operands& x, const Part& part) {
  thread_local Tile tile;
  thread_local std::vector<float> memory;
  const int64_t heads = cache.heads(), head_dim = cache.head_dim, s = part.segment;
  const int64_t vectors = part.rows * cache.group, padded = (vectors + kRows - 1) / kRows * kRows;
  const auto place = [&](int64_t row, int64_t v) { return row * heads + part.head * cache.group + v % cache.group; };
  tile.Resize(padded);
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t v = std::min(i, vectors - 1), row = part.row + v / cache.group;
    tile.query[i] = x.query + place(row, v) * head_dim;
    tile.low[i] = x.Low(s, row);
    tile.high[i] = x.High(s, row);
  }
  memory.resize(State::Size(padded, head_dim));
  const State state = State::Nothing(memory.data(), padded, head_dim);
  const int64_t out_row = x.out_begin[s] + part.row - x.query_begin[s];
  const auto result = [&](int64_t v) { return place(out_row + v / cache.group, v); };
  for (int64_t v = 0; x.cut && v < vectors; ++v) {
    std::copy_n(x.out + result(v) * head_dim, head_dim, state.total + v * head_dim);
    state.weight[v] = x.lse[result(v)];
    state.peak[v] = x.peak[result(v)];
  }
  AttendTile(cache, tile, x.Pages(s), part.head, x.cut, state);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t to = result(v);
    if (x.cut) {
      std::copy_n(state.total + v * head_dim, head_dim, x.out + to * head_dim);
      x.lse[to] = state.weight[v];
      x.peak[to] = state.peak[v];
    } else {
      x.lse[to] = Finish(&state, 1, v, head_dim, x.out + to * head_dim);
    }
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

template <typename T>
ffi::Error Run(ffi::ThreadPool& pool, const Operands& x, ffi::AnyBuffer key, ffi::AnyBuffer value, int64_t layer,
               int64_t group, ffi::RemainingArgs scales, float softcap) {
  const auto shape = key.dimensions();
  const int64_t pages = shape[1], page_size = shape[2], kv_heads = shape[3], head_dim = shape[4];
  const int64_t index = std::clamp<int64_t>(layer, 0, shape[0] - 1), start = index * pages * page_size * kv_heads;
  const float* scale[2] = {nullptr, nullptr};
  for (size_t i = 0; i < scales.size(); ++i) {
    auto given = scales.get<ffi::Buffer<ffi::F32>>(i);
    if (!given.has_value()) return given.error();
    scale[i] = given->typed_data() + start;
  }
  const T* keys = static_cast<const T*>(key.untyped_data()) + start * head_dim;
  const T* values = static_cast<const T*>(value.untyped_data()) + start * head_dim;
  AttendSegments<T>(
      pool, {keys, values, scale[0], scale[1], pages, page_size, kv_heads, group, head_dim, softcap}, x);
  return ffi::Error::Success();
}

// Operands: query [rows, heads, head_dim], scaled; position [rows]; key and value [layers, pages, page_size, kv_heads,
// head_dim]; layer; block_table [sequences, pages_per_sequence]; segments [6, segments], in the order of the fields of
// `Segments`; window; the sum, weight and peak so far of an ordered computation, which are those of the result; and
// key_scale and value_scale [layers, pages, kv_heads, page_size] of a quantized cache.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::S32> position, ffi::AnyBuffer key,
                  ffi::AnyBuffer value, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> block_table,
                  ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::S32> window, ffi::RemainingArgs scales,
                  float softcap, int64_t cut, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse,
                  float* peak) {
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
  x.page_size = key.dimensions()[2];
  x.cut = cut;
  x.out = out->typed_data();
  x.lse = lse->typed_data();
  x.peak = peak;
  const int32_t** fields[] = {&x.query_begin, &x.query_count, &x.table_row, &x.kv_begin, &x.kv_end, &x.out_begin};
  for (int64_t i = 0; i < 6; ++i) *fields[i] = segments.typed_data() + i * x.segments;
  const int64_t group = query.dimensions()[1] / key.dimensions()[3];
  const auto run = [&](auto zero) {
    return Run<decltype(zero)>(pool, x, key, value, layer.typed_data()[0], group, scales, softcap);
  };
  switch (key.element_type()) {
    case ffi::F32:
      return run(float{});
    case ffi::BF16:
      return run(BFloat16{});
    case ffi::S8:
      return run(int8_t{});
    case ffi::F8E4M3FN:
      return run(Float8{});
    default:
      return ffi::Error::InvalidArgument("the cache has a type that this kernel does not read");
  }
}

ffi::Error Unordered(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::S32> position,
                     ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::Buffer<ffi::S32> layer,
                     ffi::Buffer<ffi::S32> block_table, ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::S32> window,
                     ffi::RemainingArgs scales, float softcap, ffi::ResultBuffer<ffi::F32> out,
                     ffi::ResultBuffer<ffi::F32> lse) {
  return Attend(pool, query, position, key, value, layer, block_table, segments, window, scales, softcap, 0, out, lse,
                nullptr);
}

ffi::Error Ordered(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::S32> position,
                   ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::Buffer<ffi::S32> layer,
                   ffi::Buffer<ffi::S32> block_table, ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::S32> window,
                   ffi::Buffer<ffi::F32> total, ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> peak,
                   ffi::RemainingArgs scales, float softcap, int64_t cut, ffi::ResultBuffer<ffi::F32> new_total,
                   ffi::ResultBuffer<ffi::F32> new_weight, ffi::ResultBuffer<ffi::F32> new_peak) {
  // As a rule they are the same memory.
  const auto keep = [](ffi::Buffer<ffi::F32>& from, ffi::ResultBuffer<ffi::F32>& to) {
    if (from.typed_data() != to->typed_data()) std::copy_n(from.typed_data(), from.element_count(), to->typed_data());
  };
  keep(total, new_total);
  keep(weight, new_weight);
  keep(peak, new_peak);
  return Attend(pool, query, position, key, value, layer, block_table, segments, window, scales, softcap, cut,
                new_total, new_weight, new_peak->typed_data());
}

// What both begin with.
auto Operation() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, Unordered,
                              Operation()
                                  .RemainingArgs()
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention_ordered, Ordered,
                              Operation()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("cut")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
