#include "service/observe/address.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kvshrink/error.h"

namespace kvshrink::service {

absl::StatusOr<HostPort> HostPort::Parse(std::string_view field, std::string_view text) {
  constexpr std::string_view kRule = "must be host:port, for example 127.0.0.1:7420 or [::1]:0";
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0) {
    return BadArgument(field, text, kRule);
  }
  const std::string_view host = text.substr(0, colon);
  const std::string_view digits = text.substr(colon + 1);
  const bool bracketed = host.front() == '[' && host.back() == ']' && host.size() > 2;
  const bool plain = host.find_first_of(":[], \t+") == std::string_view::npos;
  int port = 0;
  if (!(bracketed || plain) || digits.empty() || digits.size() > 5 ||
      digits.find_first_not_of("0123456789") != std::string_view::npos ||
      !absl::SimpleAtoi(std::string(digits), &port) || port > 65535) {
    return BadArgument(field, text, kRule);
  }
  return HostPort{std::string(host), port};
}

std::string HostPort::ToString() const { return absl::StrCat(host, ":", port); }

}  // namespace kvshrink::service
