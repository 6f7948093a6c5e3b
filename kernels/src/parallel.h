// Runs parts of a kernel on XLA's own threads, so that no more threads run than XLA was given.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace lepton {

// Lets another hardware thread of this core go on.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// How often to look whether parts that others have begun are done, before sleeping: some 30 microseconds. Parts take no
// longer as a rule, and to be woken takes as long, in a virtual machine more.
constexpr int kLooks = 1000;

// For how long a thread of the pool that found nothing more to do surely looks for more before it sleeps, in nanoseconds.
constexpr int64_t kAwake = 30'000;

inline int64_t nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

// When another thread of the pool was last done with parts.
inline std::atomic<int64_t>& last_helped() {
  static std::atomic<int64_t> at{INT64_MIN / 2};
  return at;
}

// Whether another thread is awake, as far as one knows: then it takes parts at once, and even short ones are worth it.
inline bool others_are_awake() { return nanoseconds() - last_helped().load(std::memory_order_relaxed) < kAwake; }

// Calls work(i) for each i below `count`. The calling thread takes parts like all others and waits only for parts that
// another thread has begun: so it cannot wait for ever, even if it is the pool's only thread.
template <typename Work>
void run_parts(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  const int64_t helpers = std::min<int64_t>(count, pool.num_threads()) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  auto state = std::make_shared<State>();
  // A helper that comes late finds nothing left; it must not touch `work`, which is gone by then.
  auto take = [state, count, &work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_one();
      }
    }
  };
  for (int64_t helper = 0; helper < helpers; ++helper)
    pool.Schedule([take] {
      take();
      last_helped().store(nanoseconds(), std::memory_order_relaxed);
    });
  take();
  for (int look = 0; look < kLooks && state->done.load() != count; ++look) pause();
  if (state->done.load() == count) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace lepton
