// Errors of the store name the field, its value and the rule.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace kvshrink::store {

// Abseil's own string_view, which Debian builds as a type apart from std's.
inline absl::string_view AbslView(std::string_view text) { return {text.data(), text.size()}; }

// Bytes of a peer or the disk, as they may stand in a message.
inline std::string Printable(std::string_view bytes) { return absl::CHexEscape(AbslView(bytes)); }

// A value that a caller gave. Message: "field 'layers' is 0: must be 1..4096".
template <typename Value>
absl::Status BadField(absl::string_view field, const Value& value, absl::string_view rule) {
  return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is ", value, ": ", rule));
}

// A value found on disk. Message: "stored field 'layers' is 0: must be 1..4096".
template <typename Value>
absl::Status BadStored(absl::string_view field, const Value& value, absl::string_view rule) {
  return absl::DataLossError(absl::StrCat("stored field '", field, "' is ", value, ": ", rule));
}

}  // namespace kvshrink::store
