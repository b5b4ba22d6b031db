#include "kvshrink/client/layer_ropes.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/numbers.h"
#include "kvshrink/block.h"
#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

constexpr std::string_view kMetadataPrefix = "rope_";
constexpr std::string_view kNone = "none";
constexpr size_t kShownBytes = 64;

constexpr std::array<std::pair<std::string_view, double Rope::*>, 7> kNumbers = {{
    {"theta", &Rope::theta},
    {"factor", &Rope::factor},
    {"original_max_position", &Rope::original_max_position},
    {"beta_fast", &Rope::beta_fast},
    {"beta_slow", &Rope::beta_slow},
    {"low_freq_factor", &Rope::low_freq_factor},
    {"high_freq_factor", &Rope::high_freq_factor},
}};

absl::Status Bad(std::string_view key, std::string_view value, std::string_view rule) {
  return BadArgument(StrCat("rope.", key.substr(0, kShownBytes)),
                     StrCat("'", value.substr(0, kShownBytes), "'"), rule);
}

std::vector<std::string_view> Split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) {
      return parts;
    }
    text.remove_prefix(end + 1);
  }
}

template <typename Names>
absl::Status SetName(std::string_view key, std::string_view value, std::string_view rule,
                     Names from_name, auto* out) {
  const auto found = from_name(value);
  if (!found.has_value()) {
    return Bad(key, value, rule);
  }
  *out = *found;
  return absl::OkStatus();
}

absl::Status Set(std::string_view key, std::string_view value, Rope* rope) {
  if (key == "pairing") {
    return SetName(key, value, "must be neox or gptj", RopePairingFromName, &rope->pairing);
  }
  if (key == "scaling") {
    return SetName(key, value, "must be none, linear, ntk, yarn, yarn-untruncated or llama3",
                   RopeScalingFromName, &rope->scaling);
  }
  if (key == "dim") {
    return absl::SimpleAtoi(ToAbsl(value), &rope->rotary_dim)
               ? absl::OkStatus()
               : Bad(key, value, "must be a number of channels");
  }
  if (key == "position_offset") {
    return absl::SimpleAtoi(ToAbsl(value), &rope->position_offset)
               ? absl::OkStatus()
               : Bad(key, value, "must be a whole number of 32 bits");
  }
  for (const auto& [name, number] : kNumbers) {
    if (key == name) {
      return absl::SimpleAtod(ToAbsl(value), &(rope->*number))
                 ? absl::OkStatus()
                 : Bad(key, value, "must be a number");
    }
  }
  return Bad(key, value, "is no setting of a rotary embedding");
}

}  // namespace

absl::StatusOr<LayerRopes> LayerRopes::Parse(std::string_view text) {
  LayerRopes ropes;
  if (text == kNone) {
    return ropes;
  }
  for (const std::string_view part : Split(text, ',')) {
    const size_t equals = part.find('=');
    if (equals == std::string_view::npos) {
      return Bad(part, "", "must be key=value");
    }
    KVSHRINK_RETURN_IF_ERROR(ropes.Add(part.substr(0, equals), part.substr(equals + 1)));
  }
  KVSHRINK_RETURN_IF_ERROR(ropes.Finish());
  return ropes;
}

absl::StatusOr<LayerRopes> LayerRopes::FromMetadata(const Metadata& metadata) {
  LayerRopes ropes;
  for (const auto& [name, value] : metadata) {
    if (std::string_view(name).substr(0, kMetadataPrefix.size()) == kMetadataPrefix) {
      KVSHRINK_RETURN_IF_ERROR(
          ropes.Add(std::string_view(name).substr(kMetadataPrefix.size()), value));
    }
  }
  KVSHRINK_RETURN_IF_ERROR(ropes.Finish());
  return ropes;
}

absl::Status LayerRopes::Add(std::string_view key, std::string_view value) {
  Setting setting;
  const size_t at = key.find('@');
  setting.key = key.substr(0, at);
  setting.value = value;
  if (at != std::string_view::npos) {
    for (const std::string_view number : Split(key.substr(at + 1), '/')) {
      uint32_t layer = 0;
      if (!absl::SimpleAtoi(ToAbsl(number), &layer) || layer > kMaxLayer) {
        return Bad(key, number, StrCat("layers must be 0..", kMaxLayer, ", separated by /"));
      }
      setting.layers.push_back(layer);
    }
  }
  Rope scratch;
  if (setting.key != "theta" || value != kNone) {
    KVSHRINK_RETURN_IF_ERROR(Set(setting.key, value, &scratch));
  }
  for (const Setting& other : settings_) {
    const bool both =
        setting.layers.empty() == other.layers.empty() &&
        (setting.layers.empty() ||
         std::find_first_of(setting.layers.begin(), setting.layers.end(), other.layers.begin(),
                            other.layers.end()) != setting.layers.end());
    if (other.key == setting.key && both) {
      return Bad(key, value, "is there twice");
    }
  }
  // What is of all layers comes first, so that a layer's own settings win.
  const auto place = setting.layers.empty()
                         ? std::find_if(settings_.begin(), settings_.end(),
                                        [](const Setting& other) { return !other.layers.empty(); })
                         : settings_.end();
  settings_.insert(place, std::move(setting));
  return absl::OkStatus();
}

absl::Status LayerRopes::Finish() const {
  const bool theta = std::any_of(settings_.begin(), settings_.end(), [](const Setting& setting) {
    return setting.key == "theta" && setting.layers.empty();
  });
  return theta || settings_.empty() ? absl::OkStatus()
                                    : Bad("theta", "", "must be given, be it 'none'");
}

std::optional<Rope> LayerRopes::Of(uint32_t layer) const {
  Rope rope;
  bool embedded = false;
  for (const Setting& setting : settings_) {
    if (!setting.layers.empty() &&
        std::find(setting.layers.begin(), setting.layers.end(), layer) == setting.layers.end()) {
      continue;
    }
    if (setting.key == "theta") {
      embedded = setting.value != kNone;
    }
    if (setting.key != "theta" || embedded) {
      Set(setting.key, setting.value, &rope).IgnoreError();  // passed when it was added
    }
  }
  return embedded ? std::optional(rope) : std::nullopt;
}

std::string LayerRopes::Text() const {
  if (settings_.empty()) {
    return std::string(kNone);
  }
  std::string text;
  for (const Setting& setting : settings_) {
    text += StrCat(text.empty() ? "" : ",", setting.key);
    for (size_t i = 0; i < setting.layers.size(); ++i) {
      text += StrCat(i == 0 ? "@" : "/", setting.layers[i]);
    }
    text += StrCat("=", setting.value);
  }
  return text;
}

}  // namespace kvshrink::client
