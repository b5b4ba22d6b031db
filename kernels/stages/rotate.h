// The randomised Hadamard rotation of proto/FORMAT.md section 5: orthogonal, its own inverse up to
// the order of the passes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "stages/portable.h"

namespace kvshrink::stages {

enum RotationSeed : uint32_t { kRowSeed = 1, kChannelSeed = 3, kTokenSeed = 5 };

KVS_FN constexpr uint64_t Mix(uint64_t z) {
  z += 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

KVS_FN constexpr bool SignIsNegative(uint32_t seed, uint32_t index) {
  return (Mix((uint64_t{seed} << 32) + index) >> 63) != 0;
}

KVS_FN constexpr uint32_t LargestPowerOfTwo(uint32_t length) {
  uint32_t power = 1;
  while (power * 2 <= length) {
    power *= 2;
  }
  return power;
}

// Unnormalised Walsh-Hadamard transform in natural order of `count` vectors at once: entry i of
// vector j is x[i * stride + j].
template <typename T>
inline void WalshHadamard(T* x, size_t length, size_t stride, size_t count) {
  for (size_t half = 1; half < length; half *= 2) {
    for (size_t start = 0; start < length; start += 2 * half) {
      for (size_t i = start; i < start + half; ++i) {
        T* a = x + i * stride;
        T* b = a + half * stride;
        for (size_t j = 0; j < count; ++j) {
          const T sum = a[j] + b[j];
          b[j] = a[j] - b[j];
          a[j] = sum;
        }
      }
    }
  }
}

// Signs and passes for one (seed, length). Applies to `count` vectors at once, laid out as in
// WalshHadamard.
template <typename T>
class Rotation {
 public:
  Rotation(RotationSeed seed, uint32_t length)
      : length_(length), power_(LargestPowerOfTwo(length)) {
    const T scale = T{1} / std::sqrt(static_cast<T>(power_));
    first_.resize(power_);
    for (uint32_t j = 0; j < power_; ++j) {
      first_[j] = SignIsNegative(seed, j) ? -scale : scale;
    }
    for (uint32_t j = length_ - power_; power_ < length_ && j < length_; ++j) {
      second_.push_back(SignIsNegative(seed + 1, j) ? -scale : scale);
    }
  }

  uint32_t length() const { return length_; }

  void Apply(T* x, size_t stride = 1, size_t count = 1) const {
    Forward(first_, x, stride, count);
    if (!second_.empty()) {
      Forward(second_, x + (length_ - power_) * stride, stride, count);
    }
  }

  void ApplyInverse(T* x, size_t stride = 1, size_t count = 1) const {
    if (!second_.empty()) {
      Inverse(second_, x + (length_ - power_) * stride, stride, count);
    }
    Inverse(first_, x, stride, count);
  }

 private:
  static void Scale(const std::vector<T>& signs, T* x, size_t stride, size_t count) {
    for (size_t i = 0; i < signs.size(); ++i) {
      const T factor = signs[i];
      for (size_t j = 0; j < count; ++j) {
        x[i * stride + j] *= factor;
      }
    }
  }
  static void Forward(const std::vector<T>& signs, T* x, size_t stride, size_t count) {
    Scale(signs, x, stride, count);
    WalshHadamard(x, signs.size(), stride, count);
  }
  static void Inverse(const std::vector<T>& signs, T* x, size_t stride, size_t count) {
    WalshHadamard(x, signs.size(), stride, count);
    Scale(signs, x, stride, count);
  }

  uint32_t length_;
  uint32_t power_;
  std::vector<T> first_, second_;
};

}  // namespace kvshrink::stages
