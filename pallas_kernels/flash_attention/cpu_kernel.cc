// Attention within a batch, forward and backward, on CPUs: `pallas_kernels.flash_attention.backend` says what is
// computed.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/parallel.h"
#include "cpu/softmax.h"
#include "cpu/tiles.h"
#include "cpu_backward.h"
#include "cpu_operands.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// The output and the log-sum-exp of some queries of a sequence, for the query heads of one kv head.
template <typename T>
void ForwardTile(const Operands<T>& x, int64_t sequence, int64_t first, int64_t rows, int64_t head, float* out,
                 float* lse) {
  thread_local Tile tile;
  thread_local std::vector<float> memory;
  const int64_t vectors = rows * x.group(), padded = (vectors + kRows - 1) / kRows * kRows;
  const auto place = [&](int64_t v) {
    return (sequence * x.queries + first + v / x.group()) * x.heads + head * x.group() + v % x.group();
  };
  tile.Resize(padded);
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t v = std::min(i, vectors - 1), row = first + v / x.group();
    tile.query[i] = x.query + place(v) * x.head_dim;
    tile.low[i] = x.Low(sequence, row);
    tile.high[i] = x.High(sequence, row);
  }
  memory.resize(State::Size(padded, x.head_dim));
  const State state = State::Nothing(memory.data(), padded, x.head_dim);
  // A cache of one page, which is the sequence.
  const int64_t start = sequence * x.keys * x.kv_heads * x.head_dim;
  const int32_t table[] = {0};
  const Cache<T> cache{x.key + start, x.value + start, nullptr,   nullptr,    1,
                       x.keys,        x.kv_heads,      x.group(), x.head_dim, x.softcap};
  AttendTile(cache, tile, table, head, 0, state);
  for (int64_t v = 0; v < vectors; ++v) lse[place(v)] = Finish(&state, 1, v, x.head_dim, out + place(v) * x.head_dim);
}

template <typename T>
void Forward(ffi::ThreadPool& pool, const Operands<T>& x, float* out, float* lse) {
  const int64_t rows = RowsOfTile(x.queries, x.group()), tiles = (x.queries + rows - 1) / rows;
  InParallel(pool, tiles * x.batch * x.kv_heads, [&](int64_t i) {
    // The last tiles, which see most under a causal mask, first.
    const int64_t first = (tiles - 1 - i / (x.batch * x.kv_heads)) * rows, sequence = i / x.kv_heads % x.batch;
    ForwardTile(x, sequence, first, std::min(rows, x.queries - first), i % x.kv_heads, out, lse);
  });
}

// Calls `run` with the operands, in the type of the keys.
template <typename Run>
ffi::Error WithOperands(ffi::Buffer<ffi::F32> query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                        ffi::Buffer<ffi::S32> intervals, float softcap, const Run& run) {
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    const auto shape = query.dimensions(), keys = key.dimensions();
    const size_t last = shape.size() - 1;  // a batch may have several axes
    Operands<T> x;
    x.query = query.typed_data();
    x.key = static_cast<const T*>(key.untyped_data());
    x.value = static_cast<const T*>(value.untyped_data());
    x.intervals = intervals.typed_data();
    x.head_dim = shape[last];
    x.heads = shape[last - 1];
    x.queries = shape[last - 2];
    x.kv_heads = keys[last - 1];
    x.keys = keys[last - 2];
    x.batch = query.element_count() / (x.queries * x.heads * x.head_dim);
    x.softcap = softcap;
    run(x);
    return ffi::Error::Success();
  };
  switch (key.element_type()) {
    case ffi::F32:
      return of(float{});
    case ffi::BF16:
      return of(BFloat16{});
    default:
      return ffi::Error::InvalidArgument("the keys have a type that this kernel does not read");
  }
}

// Operands: query [..., queries, heads, head_dim], scaled; key and value [..., keys, kv_heads, head_dim]; intervals
// [..., queries, 2]. Results: the output and the log-sum-exp.
ffi::Error RunForward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                      ffi::Buffer<ffi::S32> intervals, float softcap, ffi::ResultBuffer<ffi::F32> out,
                      ffi::ResultBuffer<ffi::F32> lse) {
  return WithOperands(query, key, value, intervals, softcap,
                      [&](const auto& x) { Forward(pool, x, out->typed_data(), lse->typed_data()); });
}

// Operands as those of the forward pass, and the log-sum-exp and delta [..., queries, heads] and the output's gradient.
// Results: the gradients of the scaled query, and of key and value for each query head [..., keys, heads, head_dim].
ffi::Error RunBackward(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                       ffi::Buffer<ffi::S32> intervals, ffi::Buffer<ffi::F32> lse, ffi::Buffer<ffi::F32> delta,
                       ffi::Buffer<ffi::F32> out_gradient, float softcap, ffi::ResultBuffer<ffi::F32> dquery,
                       ffi::ResultBuffer<ffi::F32> dkey, ffi::ResultBuffer<ffi::F32> dvalue) {
  const RowOperands rows{lse.typed_data(), delta.typed_data(), out_gradient.typed_data()};
  const Gradients gradients{dquery->typed_data(), dkey->typed_data(), dvalue->typed_data()};
  return WithOperands(query, key, value, intervals, softcap, [&](const auto& x) {
    InParallel(pool, x.batch * x.heads,
               [&](int64_t i) { BackwardHead(x, rows, i / x.heads, i % x.heads, gradients); });
  });
}

auto Operation() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    flash_attention, RunForward,
    Operation().Attr<float>("softcap").Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(flash_attention_backward, RunBackward,
                              Operation()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
