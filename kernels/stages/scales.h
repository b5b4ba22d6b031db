// Logarithmic scales of the kvs family (proto/FORMAT.md section 5).
#pragma once

#include <cmath>
#include <cstdint>

#include "stages/portable.h"

namespace kvshrink::stages {

inline constexpr int kScaleBias = 191;
inline constexpr int kZeroOffset = 31;  // row offset that stands for a scale of zero
inline constexpr int kMaxOffset = 30;

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

template <typename T>
KVS_FN T DecodeOffset(int offset) {
  return offset == kZeroOffset ? T{0} : std::exp2(static_cast<T>(-offset) / T{6});
}

// Offset of a row's scale below the block's. A scale under half of the smallest that can be said is
// nearer to zero.
template <typename T>
KVS_FN uint8_t EncodeOffset(T scale, T block_scale) {
  if (!(scale > T{0}) || !(block_scale > T{0})) {
    return kZeroOffset;
  }
  const T steps = std::nearbyint(std::log2(block_scale / scale) * T{6});
  if (steps > T{kMaxOffset + 6}) {
    return kZeroOffset;
  }
  return static_cast<uint8_t>(steps < T{0} ? T{0} : steps > T{kMaxOffset} ? T{kMaxOffset} : steps);
}

}  // namespace kvshrink::stages
