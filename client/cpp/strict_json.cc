#include "strict_json.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

// A parser's message may quote the input, which has no bound.
constexpr size_t kMaxQuotedBytes = 160;

std::string Quoted(std::string_view text) {
  return text.size() <= kMaxQuotedBytes ? std::string(text)
                                        : StrCat(text.substr(0, kMaxQuotedBytes), "...");
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseStrictJson(std::string_view text, std::string_view field,
                                               int max_depth) {
  std::vector<std::set<std::string, std::less<>>> keys;  // of the objects that are open
  std::string violation;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= max_depth) {
        violation = StrCat("nested deeper than ", max_depth);
        return false;  // drops the value, so that nothing deep is ever built
      }
      keys.emplace_back();
    } else if ((event == Event::object_end || event == Event::array_end) && !keys.empty()) {
      keys.pop_back();
    } else if (event == Event::key && !keys.empty()) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) {
        violation = StrCat("key '", Quoted(key), "' is there twice");
      }
    }
    return violation.empty();
  };
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& error) {
    return absl::DataLossError(StrCat("field '", field, "' is no JSON: ", Quoted(error.what())));
  }
  if (!violation.empty()) {
    return absl::DataLossError(StrCat("field '", field, "' is refused: ", violation));
  }
  if (!json.is_object()) {
    return absl::DataLossError(
        StrCat("field '", field, "' is ", json.type_name(), ": must be an object"));
  }
  return json;
}

absl::StatusOr<Metadata> MetadataFromJson(const nlohmann::json& object, std::string_view field) {
  if (!object.is_object()) {
    return absl::DataLossError(
        StrCat("field '", field, "' is ", object.type_name(), ": must be an object"));
  }
  Metadata metadata;
  for (const auto& [key, value] : object.items()) {
    if (!value.is_string()) {
      return absl::DataLossError(StrCat("field '", field, ".", Quoted(key), "' is ",
                                        value.type_name(), ": must be a string"));
    }
    metadata.emplace(key, value.get_ref<const std::string&>());
  }
  return metadata;
}

}  // namespace kvshrink::client
