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

// Appends the SCALES record of a block, whose rows want the scales given: their root mean square.
// Replaces each by the one that a decoder gets; an encoder takes the digits against that one, so
// that the rounding of a scale moves the quantiser a little off its best place and is no error of
// the row's length.
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
  T largest = T{0};
  T smallest = T{0};
  for (const T scale : scales) {
    largest = std::max(largest, scale);
    smallest = scale > T{0} && (smallest == T{0} || scale < smallest) ? scale : smallest;
  }
  const uint8_t q = EncodeScale8(largest);
  const T block_scale = DecodeScale8<T>(q);
  const int step = OffsetStep(block_scale, smallest);
  out->push_back(q);
  out->push_back(static_cast<uint8_t>(step));
  BitWriter writer(out);
  for (T& scale : scales) {
    const uint8_t offset = EncodeOffset(scale, block_scale, step);
    writer.Put(offset, kOffsetBits);
    scale = block_scale * DecodeOffset<T>(offset, step);
  }
}

// The other way. False when a fp16 norm is negative or not finite, or the step is out of range.
// `bytes` has the record's size.
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
  const int step = bytes[1];
  BitReader reader(bytes.subspan(2));
  for (T& scale : scales) {
    scale = block_scale * DecodeOffset<T>(static_cast<int>(reader.Get(kOffsetBits)), step);
  }
  return step >= 1 && step <= kMaxStep;
}

}  // namespace kvshrink::stages
