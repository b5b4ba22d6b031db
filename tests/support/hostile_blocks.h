// Tensors that break codecs, from a seed: each head of each tensor is of a kind of its own.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string_view>

#include "blocks.h"
#include "stages/minifloat.h"
#include "stages/rotate.h"

namespace kvshrink::testing {

enum class Hostile : uint8_t {
  kGaussian,
  kOutlierChannels,     // a few channels 100 times the others, as keys have
  kBiased,              // a common part far larger than what differs
  kMassiveFirstTokens,  // attention sinks: rows 1000 times the others
  kDead,                // zero
  kConstant,
  kSparse,      // one channel of some rows
  kDenormal,    // the smallest numbers of fp32
  kLargest,     // the largest of bf16
  kUnevenRows,  // lengths over 20 octaves
  kLowRank,
  kAgainstRotation,  // rows that the rotation makes a single spike
  kAlternating,      // large and opposite neighbours
};
inline constexpr size_t kHostileKinds = 13;

class HostileMaker {
 public:
  explicit HostileMaker(uint32_t seed) : random_(seed) {}

  // Tokens 1..300, 1..4 kv heads, a head_dim that engines have or an odd one.
  TensorShape Shape() {
    constexpr std::array<uint32_t, 11> kHeadDims = {64, 64, 80, 96, 112, 128, 192, 256, 512, 7, 33};
    constexpr std::array<uint32_t, 7> kTokens = {1, 2, 77, 127, 128, 129, 300};
    return {kTokens[random_() % kTokens.size()], 1 + static_cast<uint32_t>(random_() % 4),
            kHeadDims[random_() % kHeadDims.size()]};
  }

  Tensor Make(TensorShape shape) {
    Tensor tensor = Zeros(shape);
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      Fill(static_cast<Hostile>(random_() % kHostileKinds), head, &tensor);
    }
    return tensor;
  }

  // All heads of one kind.
  Tensor Make(TensorShape shape, Hostile kind) {
    Tensor tensor = Zeros(shape);
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      Fill(kind, head, &tensor);
    }
    return tensor;
  }

 private:
  float Normal() { return normal_(random_); }

  void Fill(Hostile kind, uint32_t head, Tensor* tensor) {
    const TensorShape& shape = tensor->shape;
    const std::vector<float> channel = Channel(kind, shape.head_dim);
    const stages::Rotation<float> rotation(stages::kRowSeed, shape.head_dim);
    for (uint32_t t = 0; t < shape.tokens; ++t) {
      float* row = &tensor->at(t, head, 0);
      if (kind == Hostile::kAgainstRotation) {
        row[random_() % shape.head_dim] = 1 + std::fabs(Normal());
        rotation.ApplyInverse(row);
        continue;
      }
      const float weight = Normal();
      const float length = Length(kind, t);
      for (uint32_t c = 0; c < shape.head_dim; ++c) {
        row[c] = Value(kind, t, c, channel[c], weight) * length;
      }
    }
  }

  // What a head's rows have in common, channel by channel.
  std::vector<float> Channel(Hostile kind, uint32_t head_dim) {
    std::vector<float> channel(head_dim, 1.0F);
    for (float& value : channel) {
      switch (kind) {
        case Hostile::kOutlierChannels:
          value = random_() % 16 == 0 ? 100.0F : 1.0F;
          break;
        case Hostile::kBiased:
          value = 50 * Normal();
          break;
        case Hostile::kConstant:
          value = -3.25F;
          break;
        case Hostile::kLowRank:
          value = Normal();
          break;
        default:
          break;
      }
    }
    return channel;
  }

  float Length(Hostile kind, uint32_t token) {
    switch (kind) {
      case Hostile::kMassiveFirstTokens:
        return token < 3 ? 1000.0F : 1.0F;
      case Hostile::kUnevenRows:
        return std::ldexp(1.0F, static_cast<int>(random_() % 20) - 10);
      default:
        return 1.0F;
    }
  }

  float Value(Hostile kind, uint32_t token, uint32_t channel, float of_channel, float of_token) {
    switch (kind) {
      case Hostile::kOutlierChannels:
        return of_channel * Normal();
      case Hostile::kBiased:
        return of_channel + Normal();
      case Hostile::kDead:
        return 0.0F;
      case Hostile::kConstant:
        return of_channel;
      case Hostile::kSparse:
        return random_() % 97 == 0 ? Normal() : 0.0F;
      case Hostile::kDenormal:
        return std::numeric_limits<float>::denorm_min() * static_cast<float>(random_() % 1000);
      case Hostile::kLargest:
        return Normal() < 0 ? -0x1.FEp127F : 0x1.FEp127F;
      case Hostile::kLowRank:
        return of_channel * of_token + 0.01F * Normal();
      case Hostile::kAlternating:
        return (token + channel) % 2 == 0 ? 1000 + Normal() : -1000 + Normal();
      default:
        return Normal();
    }
  }

  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

// The same values in another dtype, packed, as their bytes.
inline std::vector<std::byte> Bf16Bytes(const Tensor& tensor) {
  std::vector<std::byte> bytes(tensor.values.size() * sizeof(uint16_t));
  for (size_t i = 0; i < tensor.values.size(); ++i) {
    const uint16_t bits = stages::FloatToBf16(tensor.values[i]);
    std::memcpy(bytes.data() + i * sizeof(bits), &bits, sizeof(bits));
  }
  return bytes;
}

}  // namespace kvshrink::testing
