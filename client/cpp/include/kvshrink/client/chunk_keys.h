// Names of chunks as the command line and the Python package give them. An engine that has token
// hashes uses its own keys; these can be derived without the tokens: chunk i of a run is
// "<prefix>/<i>", i in decimal from 0.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace kvshrink::client {

inline constexpr size_t kMaxKeyBytes = 128;
inline constexpr size_t kMaxNamespaceBytes = 256;
// Leaves room for the slash and any index.
inline constexpr size_t kMaxPrefixBytes = kMaxKeyBytes - 11;

std::string ChunkKey(std::string_view prefix, uint32_t index);
std::vector<std::string> ChunkKeys(std::string_view prefix, uint32_t count);
// The index of a key of this prefix; nullopt for any other key.
std::optional<uint32_t> ChunkIndex(std::string_view prefix, std::string_view key);

// Errors: INVALID_ARGUMENT naming the field.
absl::Status CheckPrefix(std::string_view prefix);
absl::Status CheckNamespace(std::string_view name_space);

}  // namespace kvshrink::client
