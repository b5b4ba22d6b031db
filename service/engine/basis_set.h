// The calibrated bases that the daemon was started with.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kvshrink/basis.h"
#include "kvshrink/codec.h"
#include "kvshrink/shard.h"

namespace kvshrink::service {

// Doesn't change once made: any thread may ask.
class BasisSet {
 public:
  // Errors: what the system says of a file, DATA_LOSS naming file and field, INVALID_ARGUMENT when
  // two files hold the same basis.
  static absl::StatusOr<BasisSet> Load(std::span<const std::string> paths);

  const std::vector<Basis>& all() const { return bases_; }

  // That a shard was coded with; null when the shard has none or it isn't loaded.
  const Basis* Of(const ShardHeader& header) const;

  // Sets `options->basis` where the profile needs one: the first loaded that fits the tensors, so
  // that a newer basis is given before older ones, which go on decoding. Errors: INVALID_ARGUMENT
  // naming encode.profile.
  absl::Status Choose(const TensorShape& shape, EncodeOptions* options) const;

 private:
  std::vector<Basis> bases_;
};

}  // namespace kvshrink::service
