#include "host_tier.h"

#include <utility>

#include "limits.h"

namespace kvshrink::store {

void HostTier::Insert(uint64_t serial, uint32_t layer, Bytes bytes) {
  const uint64_t charged = ChargedBytes(bytes->size());
  if (charged > capacity_bytes_ || Find(serial, layer) != nullptr) return;
  while (used_bytes_ > capacity_bytes_ - charged) DropOldest();
  order_.push_front({serial, layer, std::move(bytes)});
  chunks_[serial][layer] = order_.begin();
  used_bytes_ += charged;
}

Bytes HostTier::Find(uint64_t serial, uint32_t layer) {
  const auto chunk = chunks_.find(serial);
  if (chunk == chunks_.end()) return nullptr;
  const auto shard = chunk->second.find(layer);
  if (shard == chunk->second.end()) return nullptr;
  order_.splice(order_.begin(), order_, shard->second);
  return shard->second->bytes;
}

void HostTier::Erase(uint64_t serial) {
  const auto chunk = chunks_.find(serial);
  if (chunk == chunks_.end()) return;
  for (const auto& [layer, shard] : chunk->second) {
    used_bytes_ -= ChargedBytes(shard->bytes->size());
    order_.erase(shard);
  }
  chunks_.erase(chunk);
}

size_t HostTier::Count(uint64_t serial) const {
  const auto chunk = chunks_.find(serial);
  return chunk == chunks_.end() ? 0 : chunk->second.size();
}

void HostTier::DropOldest() {
  const Shard& oldest = order_.back();
  used_bytes_ -= ChargedBytes(oldest.bytes->size());
  const auto chunk = chunks_.find(oldest.serial);
  chunk->second.erase(oldest.layer);
  if (chunk->second.empty()) chunks_.erase(chunk);
  order_.pop_back();
}

}  // namespace kvshrink::store
