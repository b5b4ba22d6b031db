// The protocol's enums and statuses in the library's terms.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "grpcpp/support/status.h"
#include "kvshrink/block.h"
#include "kvshrink/profile.h"
#include "kvshrink/rope.h"
#include "kvshrink/v1/types.pb.h"

namespace kvshrink::client {

v1::DType ToProto(DType dtype);
v1::Profile ToProto(Profile profile);
v1::Rope ToProto(const Rope& rope);
// nullopt for what this library doesn't know, also when the peer sent no value.
std::optional<DType> FromProto(v1::DType dtype);
std::optional<Profile> FromProto(v1::Profile profile);

// "host", "disk", ...; "unknown" for a tier that this library doesn't know.
std::string_view TierName(v1::Tier tier);

// Of an answer of a stream. A code that isn't one becomes UNKNOWN.
absl::Status ToStatus(const v1::ObjectStatus& status);
// Of a call; the message starts with the server's address.
absl::Status ToStatus(const grpc::Status& status, const std::string& server);

// Bytes that a message takes on a stream: its own and those of its frame.
template <typename Message>
uint64_t WireBytes(const Message& message) {
  constexpr uint64_t kPrefixBytes = 5;  // flag and length before each message
  return kPrefixBytes + message.ByteSizeLong();
}

}  // namespace kvshrink::client
