// Tells whoever started the daemon where it listens.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace kvshrink::service {

// Writes {"listen": ..., "http": ...} to `path` in one step: a reader sees all of it or no file.
// Errors: UNAVAILABLE naming the path.
absl::Status WritePortFile(const std::string& path, const std::string& listen,
                           const std::string& http);

}  // namespace kvshrink::service
