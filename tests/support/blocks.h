// Blocks and tensors for the tests of the codec: random, structured and real ones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "kvshrink/codec.h"

namespace kvshrink::testing {

// K or V of one layer as fp32 [T, H, D].
struct Tensor {
  TensorShape shape;
  std::vector<float> values;

  ConstTensor View() const {
    return {reinterpret_cast<const std::byte*>(values.data()), DType::kFp32, shape,
            LayoutThd(shape)};
  }
  MutableTensor MutableView() {
    return {reinterpret_cast<std::byte*>(values.data()), DType::kFp32, shape, LayoutThd(shape)};
  }
  float& at(uint32_t token, uint32_t head, uint32_t channel) {
    return values[View().layout.Offset(token, head) + channel];
  }
};

inline Tensor Zeros(TensorShape shape) { return {shape, std::vector<float>(shape.entries())}; }

inline Tensor Gaussian(TensorShape shape, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Tensor tensor = Zeros(shape);
  for (float& value : tensor.values) {
    value = scale * normal(random);
  }
  return tensor;
}

// Rank `rank` with singular values that fall by halves, on noise of the given scale: what keys look
// like.
inline Tensor LowRankPlusNoise(TensorShape shape, int rank, float noise, uint32_t seed) {
  Tensor tensor = Gaussian(shape, seed, noise);
  std::mt19937 random(seed + 1);
  std::normal_distribution<float> normal;
  for (uint32_t head = 0; head < shape.kv_heads; ++head) {
    for (int i = 0; i < rank; ++i) {
      std::vector<float> channel(shape.head_dim);
      for (float& value : channel) {
        value = std::ldexp(normal(random), -i);
      }
      for (uint32_t token = 0; token < shape.tokens; ++token) {
        const float weight = normal(random);
        for (uint32_t c = 0; c < shape.head_dim; ++c) {
          tensor.at(token, head, c) += weight * channel[c];
        }
      }
    }
  }
  return tensor;
}

// A tensor of a committed trace (fp16), as fp32; the file is ours, so its header is only searched.
inline Tensor FromTrace(const std::string& file, const std::string& name, TensorShape shape) {
  std::ifstream in(std::string(KVSHRINK_SOURCE_DIR) + "/tests/data/" + file, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const size_t entry = bytes.find("\"" + name + "\"");
  const size_t offsets = bytes.find('[', bytes.find("data_offsets", entry));
  const size_t begin = 8 + header_bytes + std::stoull(bytes.substr(offsets + 1, 20));
  Tensor tensor = Zeros(shape);
  for (size_t i = 0; i < tensor.values.size(); ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + begin + 2 * i, sizeof(bits));
    const float magnitude =
        std::ldexp(static_cast<float>((bits & 1023) | ((bits & 0x7C00) != 0 ? 1024 : 0)),
                   std::max(1, (bits >> 10) & 31) - 25);
    tensor.values[i] = (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
  return tensor;
}

inline Tensor SmolLayer(const char* kind, int layer) {
  return FromTrace("smollm2-512.safetensors", "layer." + std::to_string(layer) + "." + kind,
                   {512, 3, 64});
}
inline Tensor QwenLayer(const char* kind, int layer) {
  return FromTrace("qwen2.5-coder-512.safetensors", "layer." + std::to_string(layer) + "." + kind,
                   {512, 2, 64});
}

struct Decoded {
  Tensor k, v;  // v is empty where the shard has keys only
};

inline absl::StatusOr<Decoded> DecodeAll(const Backend& backend, std::string_view bytes,
                                         DecodeForm form = DecodeForm::kFull) {
  const auto extent = form == DecodeForm::kFull ? Extent::kWhole : Extent::kAllowPreview;
  const absl::StatusOr<Shard> shard = Shard::Parse(bytes, extent);
  if (!shard.ok()) {
    return shard.status();
  }
  const bool keys_only = shard->header().keys_only;
  Decoded decoded{Zeros(shard->header().shape),
                  keys_only ? Tensor() : Zeros(shard->header().shape)};
  const absl::Status status =
      DecodeShard(backend, *shard, form, decoded.k.MutableView(),
                  keys_only ? std::nullopt : std::optional(decoded.v.MutableView()));
  if (!status.ok()) {
    return status;
  }
  return decoded;
}

inline double Energy(const std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) {
    sum += static_cast<double>(value) * static_cast<double>(value);
  }
  return sum;
}

inline double ErrorEnergy(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += difference * difference;
  }
  return sum;
}

inline EncodeOptions OptionsOf(Profile profile) {
  EncodeOptions options;
  options.profile = profile;
  return options;
}

// Every profile that codes without a basis.
inline std::vector<ProfileInfo> PlainProfiles() {
  std::vector<ProfileInfo> profiles;
  for (const ProfileInfo& profile : AllProfiles()) {
    if (!NeedsBasis(profile.profile)) {
      profiles.push_back(profile);
    }
  }
  return profiles;
}

}  // namespace kvshrink::testing
