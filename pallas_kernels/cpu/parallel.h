// Work for the threads that XLA runs its own operations on.

#ifndef PALLAS_KERNELS_CPU_PARALLEL_H_
#define PALLAS_KERNELS_CPU_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

// Runs work(0) .. work(count - 1) on the pool and on this thread. It takes part instead of waiting, so calls that stand
// on all threads of a pool at once still go on.
template <typename Work>
void InParallel(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // A helper that comes late finds no item, and so does not touch `work`, which may be gone.
  auto run = [state, count, &work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([run] { run(); });
  run();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace

#endif  // PALLAS_KERNELS_CPU_PARALLEL_H_
