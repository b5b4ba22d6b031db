// Making statuses and passing them on.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kvshrink/error.h"
#include "kvshrink/strcat.h"

namespace kvshrink::client {

// Abseil's own string_view type where the library was built with one (Debian's is), else
// std::string_view.
inline absl::string_view ToAbsl(std::string_view text) { return {text.data(), text.size()}; }

// The same code, the message after "where: ".
inline absl::Status InContext(std::string_view where, const absl::Status& status) {
  return absl::Status(status.code(), StrCat(where, ": ", std::string(status.message())));
}

}  // namespace kvshrink::client

#define KVSHRINK_CONCAT_INNER(a, b) a##b
#define KVSHRINK_CONCAT(a, b) KVSHRINK_CONCAT_INNER(a, b)

// Declares or sets `target` from a StatusOr, or returns its status.
#define KVSHRINK_ASSIGN_OR_RETURN(target, expression) \
  KVSHRINK_ASSIGN_OR_RETURN_AS(KVSHRINK_CONCAT(status_or_, __LINE__), target, expression)

#define KVSHRINK_ASSIGN_OR_RETURN_AS(name, target, expression) \
  auto name = (expression);                                    \
  if (!name.ok()) {                                            \
    return std::move(name).status();                           \
  }                                                            \
  target = *std::move(name)
