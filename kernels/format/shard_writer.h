// Puts the coded blocks of a shard together.
#pragma once

#include <span>
#include <string>

#include "kvshrink/codec.h"
#include "kvshrink/shard.h"

namespace kvshrink::format {

// One block as the encoder leaves it: what the backend made, and the exact bytes that go with it.
struct CodedBlock {
  Backend::BlockOutput output;
  std::string raw_rows;   // exact bytes of the raw rows
  std::string raw_block;  // exact bytes of the coded rows, when output.code is kRaw

  // Of its parts, padding included.
  size_t bytes() const {
    return PaddedBytes(raw_rows.size() + output.factors.size()) +
           PaddedBytes(output.scales.size()) + PaddedBytes(output.codes.size() + raw_block.size());
  }
};

// blocks: header.blocks() of them, in the order of the format. Where header.padded, the shard gets
// `slot_bytes` bytes in all, which must hold it.
std::string WriteShard(const ShardHeader& header, std::span<const CodedBlock> blocks,
                       uint64_t slot_bytes = 0);

}  // namespace kvshrink::format
