// Runs parts of a kernel on XLA's own threads, so that no more threads run than XLA was given.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
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

// For how long a thread that has helped looks for more parts before it goes back to its pool, in nanoseconds. From there
// it takes microseconds to come, and some 50 once it sleeps; one model's next kernel mostly begins sooner. Longer would keep
// XLA's own operations waiting for it.
constexpr int64_t kStays = 20'000;
// And at most, if there always is more, so that other work of its pool comes to its turn: as long as one image takes.
constexpr int64_t kStaysAtMost = 10'000'000;

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What threads that stay may take parts of.
class Board {
 public:
  using Take = std::function<void()>;

  static Board& of_process() {
    static auto* const board = new Board;  // never destroyed: threads of XLA may outlive it at the end of a process
    return *board;
  }
  // How many threads look for parts.
  int64_t idle() const { return idle_.load(std::memory_order_relaxed); }

  void post(const Take& take) {
    const std::lock_guard<std::mutex> lock(mutex_);
    take_ = take;
    posted_.fetch_add(1, std::memory_order_release);
  }

  // Takes what is posted until nothing was for a while.
  void stay() {
    int64_t seen = posted_.load(std::memory_order_acquire), now = nanoseconds(), until = now + kStays;
    const int64_t end = now + kStaysAtMost;
    idle_.fetch_add(1, std::memory_order_relaxed);
    for (; now < until && now < end; now = nanoseconds()) {
      for (int look = 0; look < 16 && posted_.load(std::memory_order_acquire) == seen; ++look) pause();
      if (posted_.load(std::memory_order_acquire) == seen) continue;
      Take take;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = posted_.load(std::memory_order_relaxed);
        take = take_;
      }
      idle_.fetch_sub(1, std::memory_order_relaxed);
      take();
      idle_.fetch_add(1, std::memory_order_relaxed);
      until = nanoseconds() + kStays;
    }
    idle_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  std::mutex mutex_;
  Take take_;
  std::atomic<int64_t> posted_{0}, idle_{0};
};

// Whether another thread is awake, as far as one knows: then it takes parts at once, and even short ones are worth it.
inline bool others_are_awake() { return Board::of_process().idle() > 0; }

// Calls work(i) for each i below `count`. The calling thread takes parts like all others and waits only for parts that
// another thread has begun: so it cannot wait for ever, even if it is the pool's only thread. It takes them from the first
// on and others from the last, so that parts of an image are mostly where the kernel before has left them.
template <typename Work>
void run_parts(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> taken{0}, first{0}, last{0}, done{0};
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
  const auto take = [state, count, &work](bool helps) {
    while (state->taken.fetch_add(1) < count) {
      work(helps ? count - 1 - state->last.fetch_add(1) : state->first.fetch_add(1));
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_one();
      }
    }
  };
  Board& board = Board::of_process();
  const int64_t there = std::min(helpers, board.idle());
  if (there > 0) board.post([take] { take(true); });
  for (int64_t helper = there; helper < helpers; ++helper)
    pool.Schedule([take, &board] {
      take(true);
      board.stay();
    });
  take(false);
  for (int look = 0; look < kLooks && state->done.load() != count; ++look) pause();
  if (state->done.load() == count) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace lepton
