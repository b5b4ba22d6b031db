// Page tokens of List: where the next page begins, as text that only the same question may bring
// back.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "store.h"

namespace kvshrink::store {

// `last` is the last chunk of the page; `name_space` what the list was asked for ("" = all).
// Web-safe base64.
std::string EncodePageToken(std::string_view name_space, const ChunkKey& last);

// The chunk after which the next page begins. INVALID_ARGUMENT when the token is not from a list of
// this tenant and namespace. The token's checksum finds damage, not forgery; a forged token only
// moves the page within the tenant's own chunks.
absl::StatusOr<ChunkKey> DecodePageToken(std::string_view tenant, std::string_view name_space,
                                         std::string_view token);

}  // namespace kvshrink::store
