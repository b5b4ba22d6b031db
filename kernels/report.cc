#include <algorithm>

#include "kvshrink/codec.h"

namespace kvshrink {

double KindReport::mean_rank() const {
  uint64_t count = 0;
  uint64_t sum = 0;
  for (size_t rank = 0; rank < rank_histogram.size(); ++rank) {
    count += rank_histogram[rank];
    sum += rank * rank_histogram[rank];
  }
  return count == 0 ? 0 : static_cast<double>(sum) / static_cast<double>(count);
}

void KindReport::Add(const KindReport& other) {
  bytes += other.bytes;
  entries += other.entries;
  error_energy += other.error_energy;
  energy += other.energy;
  blocks += other.blocks;
  raw_blocks += other.raw_blocks;
  escalated_blocks += other.escalated_blocks;
  for (size_t i = 0; i < rank_histogram.size(); ++i) {
    rank_histogram[i] += other.rank_histogram[i];
  }
  max_block_relative_error = std::max(max_block_relative_error, other.max_block_relative_error);
}

double KindReport::bits_per_entry() const {
  return entries == 0 ? 0 : 8 * static_cast<double>(bytes) / static_cast<double>(entries);
}

double ShardReport::bits_per_entry() const {
  return entries() == 0 ? 0
                        : 8 * static_cast<double>(encoded_bytes) / static_cast<double>(entries());
}

void ShardReport::AddShared(uint64_t bytes) {
  const uint64_t of_values = v.entries > 0 ? bytes / 2 : 0;
  k.bytes += bytes - of_values;
  v.bytes += of_values;
}

}  // namespace kvshrink
