// Errors of a block's decoder: bytes that passed the checks of the shard reader and still mean
// nothing (proto/FORMAT.md section 6, last row). Shared by the backends.
#pragma once

#include <string_view>

#include "absl/status/status.h"
#include "kvshrink/error.h"
#include "kvshrink/shard.h"
#include "kvshrink/strcat.h"

namespace kvshrink {

// `part` is scale, factor or codes.
inline absl::Status BadBlock(const BlockView& block, std::string_view part, std::string_view rule) {
  const auto place = StrCat(block.kind == Kind::kKey ? "K" : "V", " head ", block.head, ", token ",
                            block.first_row);
  return BadShard(StrCat("block[", block.index, "].", part), place, rule);
}

}  // namespace kvshrink
