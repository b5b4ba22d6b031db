// Debian builds Abseil with a string_view of its own; its functions don't take std's.
#pragma once

#include <string_view>

#include "absl/strings/string_view.h"

namespace kvshrink::service {

inline absl::string_view Text(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace kvshrink::service
