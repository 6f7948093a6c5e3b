// Runs parts of a kernel on XLA's own threads, so that no more threads run than XLA was given.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Threads that have helped. Linux often wakes one on the processor of who wakes it, where it waits for milliseconds or
// drives that one away, while another processor has nothing to do.
class Helpers {
#if defined(__linux__)
 public:
  static int here() { return sched_getcpu(); }

  // Calls `wake`, which wakes some of them, on other processors than this one where they may run.
  template <typename Wake>
  void elsewhere(const Wake& wake) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<cpu_set_t, kMost> before;
    const int at = here();
    const pid_t own = id();  // a thread of the pool may go on with a program itself
    for (size_t i = 0; i < threads_.size(); ++i)
      if (threads_[i] == own || !leave(threads_[i], at, before[i])) CPU_ZERO(&before[i]);
    wake();
    for (size_t i = 0; i < threads_.size(); ++i)
      if (CPU_COUNT(&before[i]) > 0) sched_setaffinity(threads_[i], sizeof before[i], &before[i]);
  }

  // Adds this thread, until it ends; and if it runs where the one that asked for help does, it goes elsewhere.
  void join(int asking) {
    static thread_local const Membership membership(*this);
    if (asking < 0 || here() != asking) return;
    const std::lock_guard<std::mutex> lock(mutex_);  // while `elsewhere` lends a thread other processors, these are not its own
    cpu_set_t before;
    if (leave(0, asking, before)) sched_setaffinity(0, sizeof before, &before);
  }

 private:
  // Of more threads, the system calls would take longer than is gained.
  static constexpr size_t kMost = 8;

  static pid_t id() { return static_cast<pid_t>(syscall(SYS_gettid)); }

  // Keeps a thread from a processor; false if it may run nowhere else. `before` is where it might run.
  static bool leave(pid_t thread, int processor, cpu_set_t& before) {
    if (processor < 0 || sched_getaffinity(thread, sizeof before, &before) != 0) return false;
    cpu_set_t others = before;
    CPU_CLR(processor, &others);
    return CPU_COUNT(&others) > 0 && sched_setaffinity(thread, sizeof others, &others) == 0;
  }

  struct Membership {
    Helpers& helpers;
    const pid_t thread = id();

    explicit Membership(Helpers& helpers) : helpers(helpers) {
      const std::lock_guard<std::mutex> lock(helpers.mutex_);
      if (helpers.threads_.size() < kMost) helpers.threads_.push_back(thread);
    }
    ~Membership() {
      const std::lock_guard<std::mutex> lock(helpers.mutex_);
      auto& all = helpers.threads_;
      all.erase(std::remove(all.begin(), all.end(), thread), all.end());
    }
  };
  std::mutex mutex_;
  std::vector<pid_t> threads_;
#else
 public:
  static int here() { return -1; }
  template <typename Wake>
  void elsewhere(const Wake& wake) {
    wake();
  }
  void join(int) {}
#endif
};

// What helping threads may take parts of: the latest of a process.
class Board {
 public:
  using Take = std::function<void()>;

  static Board& of_process() {
    static auto* const board = new Board;  // never destroyed: threads of XLA may outlive it at the end of a process
    return *board;
  }
  // How many threads look for parts, or have some.
  int64_t awake() const { return awake_.load(std::memory_order_relaxed); }

  // Has `wanted` threads of a pool take parts. Those that have been asked and are on their way are not asked again: each
  // would wake one more thread of the pool, and there would be more than processors.
  void post(xla::ffi::ThreadPool& pool, const Take& take, int64_t wanted) {
    asking_.store(Helpers::here(), std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      take_ = take;
      posted_.fetch_add(1);
    }
    int64_t asked = asked_.load();
    while (asked < wanted && !asked_.compare_exchange_weak(asked, wanted)) continue;
    if (asked >= wanted) return;
    asks() = true;
    helpers_.elsewhere([&] {
      for (; asked < wanted; ++asked) pool.Schedule([this] { help(); });
    });
    asks() = false;
  }

 private:
  // Whether this thread asks others: a pool whose queue is full has it do at once what it asks for.
  static bool& asks() {
    static thread_local bool asks = false;
    return asks;
  }

  // Whether something else is posted within a while.
  bool comes(int64_t seen) const {
    for (const int64_t until = nanoseconds() + kStays; nanoseconds() < until;)
      for (int look = 0; look < 16; ++look) {
        if (posted_.load(std::memory_order_acquire) != seen) return true;
        pause();
      }
    return false;
  }

  // Takes what is posted until nothing was for a while.
  void help() {
    if (asks()) {
      asked_.fetch_sub(1);
      return;
    }
    const int64_t end = nanoseconds() + kStaysAtMost;
    int64_t seen = 0;
    awake_.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      do {
        Take take;
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          seen = posted_.load(std::memory_order_relaxed);
          take = take_;
        }
        helpers_.join(asking_.load(std::memory_order_relaxed));
        take();
      } while (nanoseconds() < end && comes(seen));
      asked_.fetch_sub(1);
      if (posted_.load() == seen) break;
      asked_.fetch_add(1);  // who has posted meanwhile may have found this thread among those that were asked
    }
    awake_.fetch_sub(1, std::memory_order_relaxed);
  }

  Helpers helpers_;
  std::atomic<int> asking_{-1};  // the processor of who has posted
  std::mutex mutex_;
  Take take_;
  std::atomic<int64_t> posted_{0}, awake_{0}, asked_{0};
};

// Whether another thread is awake, as far as one knows: then it takes parts at once, and even short ones are worth it.
inline bool others_are_awake() { return Board::of_process().awake() > 0; }

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
  Board::of_process().post(pool, [take] { take(true); }, helpers);
  take(false);
  for (int look = 0; look < kLooks && state->done.load() != count; ++look) pause();
  if (state->done.load() == count) return;
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace lepton
