#include "kvshrink/client/chunk_keys.h"

#include "absl/strings/numbers.h"
#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

absl::Status CheckLength(std::string_view field, size_t length, size_t limit) {
  if (length < 1 || length > limit) {
    return BadArgument(field, StrCat("of ", length, " bytes"), StrCat("must have 1..", limit));
  }
  return absl::OkStatus();
}

}  // namespace

std::string ChunkKey(std::string_view prefix, uint32_t index) { return StrCat(prefix, "/", index); }

std::vector<std::string> ChunkKeys(std::string_view prefix, uint32_t count) {
  std::vector<std::string> keys;
  for (uint32_t i = 0; i < count; ++i) {
    keys.push_back(ChunkKey(prefix, i));
  }
  return keys;
}

std::optional<uint32_t> ChunkIndex(std::string_view prefix, std::string_view key) {
  if (key.size() <= prefix.size() + 1 || key.substr(0, prefix.size()) != prefix ||
      key[prefix.size()] != '/') {
    return std::nullopt;
  }
  uint32_t index = 0;
  // Only the form that ChunkKey writes: no sign, space or leading zero.
  if (!absl::SimpleAtoi(ToAbsl(key.substr(prefix.size() + 1)), &index) ||
      ChunkKey(prefix, index) != key) {
    return std::nullopt;
  }
  return index;
}

absl::Status CheckPrefix(std::string_view prefix) {
  return CheckLength("prefix", prefix.size(), kMaxPrefixBytes);
}

absl::Status CheckNamespace(std::string_view name_space) {
  return CheckLength("namespace", name_space.size(), kMaxNamespaceBytes);
}

}  // namespace kvshrink::client
