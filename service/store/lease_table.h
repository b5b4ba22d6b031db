// Leases: what each holds, whose it is, when it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace kvshrink::store {

// Not thread-safe. Chunks are named by serial; the caller keeps the count of leases on each chunk,
// and lowers it for every serial that comes back from here.
class LeaseTable {
 public:
  // `max_held` bounds the memory of the table: chunks held, over all leases.
  explicit LeaseTable(size_t max_held) : max_held_(max_held) {}

  // A new, empty lease. Ids are random, so that one from before a restart names nothing, and never
  // 0.
  uint64_t Open(std::string_view tenant, int64_t ends_steady_ms);
  // False when there is no such lease or the table is full.
  bool Hold(uint64_t lease_id, uint64_t serial);
  // Ends a lease of that tenant: the serials it held, or empty when it has none with this id.
  std::optional<std::vector<uint64_t>> Release(std::string_view tenant, uint64_t lease_id);
  // Ends all leases whose time is over: the serials they held.
  std::vector<uint64_t> Expire(int64_t now_steady_ms);

  size_t size() const { return leases_.size(); }

 private:
  struct Lease {
    std::string tenant;
    int64_t ends_steady_ms = 0;
    std::vector<uint64_t> serials;
  };

  const size_t max_held_;
  size_t held_ = 0;
  absl::flat_hash_map<uint64_t, Lease> leases_;
  std::set<std::pair<int64_t, uint64_t>> by_end_;  // end, id
};

}  // namespace kvshrink::store
