// The extension records of a shard (proto/FORMAT.md section 3.2).
#pragma once

#include <cstdint>
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

}  // namespace kvshrink::format
