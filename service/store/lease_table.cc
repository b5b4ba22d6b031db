#include "lease_table.h"

#include <random>

namespace kvshrink::store {

uint64_t LeaseTable::Open(std::string_view tenant, int64_t ends_steady_ms) {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  uint64_t id = 0;
  while (id == 0 || leases_.contains(id)) id = random();
  leases_[id] = Lease{std::string(tenant), ends_steady_ms, {}};
  by_end_.emplace(ends_steady_ms, id);
  return id;
}

bool LeaseTable::Hold(uint64_t lease_id, uint64_t serial) {
  const auto lease = leases_.find(lease_id);
  if (lease == leases_.end() || held_ >= max_held_) return false;
  lease->second.serials.push_back(serial);
  ++held_;
  return true;
}

std::optional<std::vector<uint64_t>> LeaseTable::Release(std::string_view tenant,
                                                         uint64_t lease_id) {
  const auto lease = leases_.find(lease_id);
  if (lease == leases_.end() || lease->second.tenant != tenant) return std::nullopt;
  std::vector<uint64_t> serials = std::move(lease->second.serials);
  held_ -= serials.size();
  by_end_.erase({lease->second.ends_steady_ms, lease_id});
  leases_.erase(lease);
  return serials;
}

std::vector<uint64_t> LeaseTable::Expire(int64_t now_steady_ms) {
  std::vector<uint64_t> serials;
  while (!by_end_.empty() && by_end_.begin()->first <= now_steady_ms) {
    const auto lease = leases_.find(by_end_.begin()->second);
    held_ -= lease->second.serials.size();
    serials.insert(serials.end(), lease->second.serials.begin(), lease->second.serials.end());
    leases_.erase(lease);
    by_end_.erase(by_end_.begin());
  }
  return serials;
}

}  // namespace kvshrink::store
