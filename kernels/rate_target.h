// Sharing out the bits of a shard over its blocks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "block_plan.h"
#include "kvshrink/codec.h"

namespace kvshrink {

// Chooses alphabet, rank and factor bits of every block so that the shard has at most
// ShardBytesAt(shape, bits_per_entry) bytes, for the least estimated error of attention outputs.
// `places` and `spectra`: header.blocks() of each; plans of blocks that aren't coded are unused.
// Errors: INVALID_ARGUMENT naming bits_per_entry and the least that the shard needs.
absl::StatusOr<std::vector<BlockPlan>> PlanForRate(const ShardHeader& header,
                                                   std::span<const BlockView> places,
                                                   std::span<const Backend::BlockSpectrum> spectra,
                                                   double bits_per_entry);

}  // namespace kvshrink
