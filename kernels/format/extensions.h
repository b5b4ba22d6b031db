// The extension records of a shard (proto/FORMAT.md section 3.2).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "kvshrink/shard.h"

namespace kvshrink::format {

// The bytes of all records of a shard, by ascending type.
std::string WriteExtensions(const ShardExtensions& extensions);

// `bytes`: the whole extension part, of a size that the header's check has passed. Errors:
// DATA_LOSS naming extension.<field>.
absl::Status ReadExtensions(std::span<const uint8_t> bytes, const TensorShape& shape,
                            ShardExtensions* extensions);

// A rope as FORMAT.md section 3.3 writes it, in shards and in bases. The fault's field is "size" or
// that of the rope.
std::string RopePayload(const Rope& rope);
std::optional<RopeFault> ReadRopePayload(std::span<const uint8_t> payload, uint32_t head_dim,
                                         Rope* out);

}  // namespace kvshrink::format
