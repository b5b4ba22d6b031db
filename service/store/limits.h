// Bounds that hold for every chunk of the store, checked when a shard comes in and when a record is
// read back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvshrink::store {

inline constexpr size_t kMaxTenantBytes = 256;
inline constexpr size_t kMaxNamespaceBytes = 256;
inline constexpr size_t kMaxKeyBytes = 128;
inline constexpr uint32_t kMaxLayers = 4096;
// Of one shard. RocksDB takes values of up to 3 GiB.
inline constexpr uint64_t kMaxShardBytes = uint64_t{2} << 30;
// Of the tensors a shard was made from; keeps the sum over a chunk's layers far from 2^64.
inline constexpr uint64_t kMaxRawBytes = uint64_t{1} << 40;

// What a shard's entries in the index and the tiers cost in memory, about. Budgets count it beside
// the shard's bytes: else a peer with tiny shards would fill the memory long before the budget.
inline constexpr uint64_t kShardOverheadBytes = 256;

// What a shard counts against a budget.
constexpr uint64_t ChargedBytes(uint64_t shard_bytes) { return shard_bytes + kShardOverheadBytes; }

}  // namespace kvshrink::store
