// host:port, the form in which the daemon names where it listens.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace kvshrink::service {

struct HostPort {
  std::string host;  // IPv6 in brackets
  int port = 0;

  // INVALID_ARGUMENT naming `field` unless `text` is a host, a colon and a port of 0..65535.
  static absl::StatusOr<HostPort> Parse(std::string_view field, std::string_view text);
  std::string ToString() const;
};

}  // namespace kvshrink::service
