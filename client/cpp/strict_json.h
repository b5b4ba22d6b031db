// JSON from a file that nobody vouches for.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "kvshrink/client/safetensors.h"
#include "nlohmann/json.hpp"

namespace kvshrink::client {

// An object without a key twice and nested at most `max_depth` deep (1 = values only). Errors:
// DATA_LOSS naming `field`.
absl::StatusOr<nlohmann::json> ParseStrictJson(std::string_view text, std::string_view field,
                                               int max_depth);

// An object whose values are all strings. Errors: DATA_LOSS naming `field`.
absl::StatusOr<Metadata> MetadataFromJson(const nlohmann::json& object, std::string_view field);

}  // namespace kvshrink::client
