// The daemon's log: one line per event on stderr, `time level event key=value ...`.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace kvshrink::service {

// Sets up spdlog's default logger. `level` is debug, info, warn, error or off; INVALID_ARGUMENT
// otherwise.
absl::Status SetUpLog(std::string_view level);

// Opaque bytes of a caller (keys, namespaces) as text that can't break a line.
std::string Printable(std::string_view bytes);

}  // namespace kvshrink::service
