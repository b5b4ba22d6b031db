// The rotary embeddings of a model's layers as text: of an option, or of a trace's metadata.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/client/safetensors.h"
#include "kvshrink/rope.h"

namespace kvshrink::client {

// Settings `key=value`; `key@5/11/17=value` is that of these layers alone. Keys: theta (needed;
// `none`: these layers have no embedding), dim, pairing, scaling, factor, original_max_position,
// beta_fast, beta_slow, low_freq_factor, high_freq_factor, position_offset.
class LayerRopes {
 public:
  // No layer has an embedding.
  LayerRopes() = default;

  // Settings separated by commas; "none" is no embedding. Errors: INVALID_ARGUMENT naming
  // rope.<key>.
  static absl::StatusOr<LayerRopes> Parse(std::string_view text);
  // Metadata whose keys are `rope_` and a key as above; nothing of the kind: none. Errors:
  // INVALID_ARGUMENT naming rope.<key>.
  static absl::StatusOr<LayerRopes> FromMetadata(const Metadata& metadata);

  bool empty() const { return settings_.empty(); }
  // Whether its numbers fit is left to the encoder.
  std::optional<Rope> Of(uint32_t layer) const;
  // As Parse reads it; "none" when empty.
  std::string Text() const;

 private:
  absl::Status Add(std::string_view key, std::string_view value);
  absl::Status Finish() const;

  struct Setting {
    std::string key;
    std::vector<uint32_t> layers;  // empty: of all
    std::string value;
  };
  std::vector<Setting> settings_;  // those of all layers first
};

}  // namespace kvshrink::client
