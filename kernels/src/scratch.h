// Memory for what is in between.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace lepton {

// Memory of a thread that its calls share; null if there is none.
inline void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size = memory == nullptr ? 0 : bytes;
  }
  return memory.get();
}

}  // namespace lepton
