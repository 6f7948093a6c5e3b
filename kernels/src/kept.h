// Packed copies of weights that stay as they are, so that each is packed once and not on each call.
//
// Who loads weights says which memory will not change, and until when. Memory of which nobody said so is packed on each
// call, so a kernel never computes with a copy of what was there before.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace lepton {

// Panels of one weight; each is filled by the first call that needs it.
class KeptPanels {
 public:
  KeptPanels(int64_t count, int64_t panel_bytes);
  ~KeptPanels();
  KeptPanels(const KeptPanels&) = delete;
  KeptPanels& operator=(const KeptPanels&) = delete;
  bool allocated() const { return memory_ != nullptr && states_ != nullptr; }
  int64_t bytes() const { return count_ * bytes_; }

  // The panel's memory, aligned to 64 bytes; null if another thread is filling it. If `fill` is set, the caller fills it
  // and then calls `filled`. Inlined always: code for an instruction set must not be shared with others.
  __attribute__((always_inline)) int8_t* panel(int64_t index, bool& fill) {
    fill = false;
    uint8_t state = states_[index].load(std::memory_order_acquire);
    if (state == kEmpty) fill = states_[index].compare_exchange_strong(state, kBeingFilled);
    return fill || state == kFull ? memory_ + index * bytes_ : nullptr;
  }
  __attribute__((always_inline)) void filled(int64_t index) { states_[index].store(kFull, std::memory_order_release); }

 private:
  enum : uint8_t { kEmpty, kBeingFilled, kFull };
  int64_t count_, bytes_;
  int8_t* memory_;
  std::atomic<uint8_t>* states_;
};

// Weights whose elements do not change between `keep` and as many calls of `release`.
void keep(const void* weight, int64_t bytes);
void release(const void* weight);

// Bytes of the packed copies of a weight.
int64_t packed_bytes(const void* weight);

// The `count` panels of a weight of `bytes` for an instruction set; null if the weight is not kept, or there is no memory.
// The same bytes may be matrices with several numbers of columns, read in several numbers of runs.
std::shared_ptr<KeptPanels> kept_panels(const void* weight, int64_t bytes, const void* variant, int64_t columns,
                                        int64_t runs, int64_t count, int64_t panel_bytes);

}  // namespace lepton
