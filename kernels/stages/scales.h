// Logarithmic scales of the kvs family (proto/FORMAT.md section 5).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "stages/portable.h"

namespace kvshrink::stages {

inline constexpr int kScaleBias = 191;
inline constexpr int kOffsetBits = 4;
inline constexpr int kZeroOffset = 15;  // row offset that stands for a scale of zero
inline constexpr int kMaxOffset = 14;
inline constexpr int kStepsPerOctave = 16;
inline constexpr int kMaxStep = 64;       // of the format
inline constexpr int kCoarsestStep = 16;  // that an encoder takes: one row far from the others must
                                          // not make their scales useless

template <typename T>
KVS_FN T DecodeScale8(int q) {
  return std::exp2(static_cast<T>(q - kScaleBias) / T{8});
}

// Nearest in the logarithm; values outside the range take its end.
template <typename T>
KVS_FN uint8_t EncodeScale8(T scale) {
  if (!(scale > T{0})) {
    return 0;
  }
  const T q = std::nearbyint(std::log2(scale) * T{8}) + T{kScaleBias};
  return static_cast<uint8_t>(q < T{0} ? T{0} : q > T{255} ? T{255} : q);
}

// Bytes of the SCALES record of m rows.
constexpr size_t KvsScaleBytes(size_t m) { return 2 + (m * kOffsetBits + 7) / 8; }

// The finest step, in sixteenths of an octave, whose offsets reach from the block's scale down to
// `smallest`, the smallest scale of a row that isn't zero.
template <typename T>
KVS_FN int OffsetStep(T block_scale, T smallest) {
  if (!(smallest > T{0}) || !(block_scale > smallest)) {
    return 1;
  }
  const T step = std::ceil(std::log2(block_scale / smallest) * T{kStepsPerOctave} / T{kMaxOffset});
  return step < T{1} ? 1 : step > T{kCoarsestStep} ? kCoarsestStep : static_cast<int>(step);
}

template <typename T>
KVS_FN T DecodeOffset(int offset, int step) {
  return offset == kZeroOffset ? T{0}
                               : std::exp2(static_cast<T>(-offset * step) / T{kStepsPerOctave});
}

// Offset of a row's scale below the block's. A scale of more than a step below the smallest that
// can be said becomes zero.
template <typename T>
KVS_FN uint8_t EncodeOffset(T scale, T block_scale, int step) {
  if (!(scale > T{0}) || !(block_scale > T{0})) {
    return kZeroOffset;
  }
  const T offset =
      std::nearbyint(std::log2(block_scale / scale) * T{kStepsPerOctave} / static_cast<T>(step));
  if (offset > T{kMaxOffset + 1}) {
    return kZeroOffset;
  }
  return static_cast<uint8_t>(offset < T{0}            ? T{0}
                              : offset > T{kMaxOffset} ? T{kMaxOffset}
                                                       : offset);
}

}  // namespace kvshrink::stages
