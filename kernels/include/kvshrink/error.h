// Errors of the codec: Abseil statuses whose message names the field, the value and the rule.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "kvshrink/strcat.h"

namespace kvshrink {

// A value that a caller gave. Message: "field 'head_dim' is 0: must be 1..512".
template <typename Value>
absl::Status BadArgument(std::string_view field, const Value& value, std::string_view rule) {
  return absl::InvalidArgumentError(StrCat("field '", field, "' is ", value, ": ", rule));
}

// A value found in the bytes of a shard. The caller decides whether the bytes were an argument
// (then it turns the code into INVALID_ARGUMENT) or came from a store.
template <typename Value>
absl::Status BadShard(std::string_view field, const Value& value, std::string_view rule) {
  return absl::DataLossError(StrCat("shard field '", field, "' is ", value, ": ", rule));
}

}  // namespace kvshrink

#define KVSHRINK_RETURN_IF_ERROR(expression)                    \
  do {                                                          \
    if (::absl::Status status_ = (expression); !status_.ok()) { \
      return status_;                                           \
    }                                                           \
  } while (false)
