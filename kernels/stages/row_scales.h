// Row scales of the residual: what multiplies a row's levels (proto/FORMAT.md sections 5.2
// and 5.4). T is double in the reference, float elsewhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "kvshrink/profile.h"
#include "stages/digits.h"
#include "stages/minifloat.h"
#include "stages/scales.h"

namespace kvshrink::stages {

inline constexpr int kOffsetBits = 5;

// Sums over one rotated row x and its levels l.
template <typename T>
struct RowSums {
  T energy = T{0};        // sum x^2
  T level_energy = T{0};  // sum l^2
  T product = T{0};       // sum x l

  // Sum of squared error when the levels are multiplied by `scale`.
  double Error(double scale) const {
    const double error = static_cast<double>(energy) - 2 * scale * static_cast<double>(product) +
                         scale * scale * static_cast<double>(level_energy);
    return std::max(0.0, error);
  }
};

// The scale that an encoder wants: kvs takes the matched norm rms(x) / rms(l), TurboQuant's is the
// row's own rms.
template <typename T>
KVS_FN T WantedScale(Family family, const RowSums<T>& sums, uint32_t d) {
  if (family != Family::kKvs) {
    return std::sqrt(sums.energy / static_cast<T>(d));
  }
  return sums.level_energy > T{0} ? std::sqrt(sums.energy / sums.level_energy) : T{0};
}

// Appends the SCALES record of a block. Replaces each wanted scale by the one that a decoder gets.
template <typename T>
void WriteRowScales(Family family, uint32_t d, std::span<T> scales, std::vector<uint8_t>* out) {
  if (family != Family::kKvs) {
    const T root = std::sqrt(static_cast<T>(d));
    for (T& scale : scales) {
      const uint16_t norm = FloatToFp16(static_cast<float>(scale * root));
      out->push_back(static_cast<uint8_t>(norm & 255));
      out->push_back(static_cast<uint8_t>(norm >> 8));
      scale = static_cast<T>(Fp16ToFloat(norm)) / root;
    }
    return;
  }
  const uint8_t largest = EncodeScale8(*std::max_element(scales.begin(), scales.end()));
  const T block_scale = DecodeScale8<T>(largest);
  out->push_back(largest);
  BitWriter writer(out);
  for (T& scale : scales) {
    const uint8_t offset = EncodeOffset(scale, block_scale);
    writer.Put(offset, kOffsetBits);
    scale = block_scale * DecodeOffset<T>(offset);
  }
}

// The other way. False when a fp16 norm is negative or not finite. `bytes` has the record's size.
template <typename T>
bool ReadRowScales(Family family, uint32_t d, std::span<const uint8_t> bytes, std::span<T> scales) {
  if (family != Family::kKvs) {
    const T root = std::sqrt(static_cast<T>(d));
    bool valid = true;
    for (size_t t = 0; t < scales.size(); ++t) {
      const float norm = Fp16ToFloat(static_cast<uint16_t>(bytes[2 * t] | (bytes[2 * t + 1] << 8)));
      valid &= norm >= 0 && std::isfinite(norm);
      scales[t] = static_cast<T>(norm) / root;
    }
    return valid;
  }
  const T block_scale = DecodeScale8<T>(bytes[0]);
  BitReader reader(bytes.subspan(1));
  for (T& scale : scales) {
    scale = block_scale * DecodeOffset<T>(static_cast<int>(reader.Get(kOffsetBits)));
  }
  return true;
}

}  // namespace kvshrink::stages
