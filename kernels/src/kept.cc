// Packed copies of weights: see kept.h.
#include "kept.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace lepton {
namespace {

struct Copy {
  const void* variant;
  int64_t columns, runs;
  std::shared_ptr<KeptPanels> panels;
};

struct Weight {
  int64_t bytes;
  int64_t holders = 0;
  std::vector<Copy> copies;
};

// Never destroyed: threads of XLA may outlive it at the end of a process.
std::shared_mutex& mutex() {
  static auto* const made = new std::shared_mutex;
  return *made;
}

std::unordered_map<const void*, Weight>& weights() {
  static auto* const made = new std::unordered_map<const void*, Weight>;
  return *made;
}

std::shared_ptr<KeptPanels> find(const void* weight, int64_t bytes, const void* variant, int64_t columns, int64_t runs,
                                 bool& known) {
  const auto found = weights().find(weight);
  known = found != weights().end() && found->second.bytes == bytes;
  if (!known) return nullptr;
  for (const Copy& copy : found->second.copies)
    if (copy.variant == variant && copy.columns == columns && copy.runs == runs) return copy.panels;
  return nullptr;
}

}  // namespace

KeptPanels::KeptPanels(int64_t count, int64_t panel_bytes)
    : count_(count),
      bytes_(panel_bytes),
      memory_(static_cast<int8_t*>(std::aligned_alloc(64, count * panel_bytes))),
      states_(new (std::nothrow) std::atomic<uint8_t>[count]()) {}

KeptPanels::~KeptPanels() {
  std::free(memory_);
  delete[] states_;
}

void keep(const void* weight, int64_t bytes) {
  const std::unique_lock lock(mutex());
  Weight& kept = weights()[weight];
  kept.bytes = bytes;
  ++kept.holders;
}

void release(const void* weight) {
  const std::unique_lock lock(mutex());
  const auto found = weights().find(weight);
  if (found != weights().end() && --found->second.holders <= 0) weights().erase(found);
}

int64_t packed_bytes(const void* weight) {
  const std::shared_lock lock(mutex());
  const auto found = weights().find(weight);
  int64_t bytes = 0;
  if (found != weights().end())
    for (const Copy& copy : found->second.copies) bytes += copy.panels->bytes();
  return bytes;
}

std::shared_ptr<KeptPanels> kept_panels(const void* weight, int64_t bytes, const void* variant, int64_t columns,
                                        int64_t runs, int64_t count, int64_t panel_bytes) {
  bool known;
  {
    const std::shared_lock lock(mutex());
    auto panels = find(weight, bytes, variant, columns, runs, known);
    if (!known || panels != nullptr) return panels;
  }
  const std::unique_lock lock(mutex());
  auto panels = find(weight, bytes, variant, columns, runs, known);
  if (!known || panels != nullptr) return panels;
  panels = std::make_shared<KeptPanels>(count, panel_bytes);
  if (!panels->allocated()) return nullptr;
  weights()[weight].copies.push_back({variant, columns, runs, panels});
  return panels;
}

}  // namespace lepton
