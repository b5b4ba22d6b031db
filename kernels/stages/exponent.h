// The block exponent: magnitudes are coded relative to a power of two near the block's largest, so
// that scaling a block by a power of two changes its exponent and nothing else (proto/FORMAT.md
// section 5).
#pragma once

#include <cmath>
#include <cstddef>

#include "stages/portable.h"

namespace kvshrink::stages {

struct BlockRange {
  bool finite = true;
  float largest = 0;  // magnitude
};

KVS_FN BlockRange RangeOf(const float* x, size_t count) {
  BlockRange range;
  float largest = 0;
  bool finite = true;
  for (size_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(x[i]);
    finite &= magnitude <= 3.40282347e38F;
    largest = magnitude > largest ? magnitude : largest;
  }
  range.finite = finite;
  range.largest = largest;
  return range;
}

// In eight partial sums, so that it is fast and the same everywhere.
KVS_FN double SumOfSquares(const float* x, size_t count) {
  double part[8] = {};
  const size_t whole = count / 8 * 8;
  for (size_t i = 0; i < whole; i += 8) {
    for (size_t j = 0; j < 8; ++j) {
      part[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
    }
  }
  for (size_t i = whole; i < count; ++i) {
    part[i % 8] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  double sum = 0;
  for (const double value : part) {
    sum += value;
  }
  return sum;
}

// Exponent that brings a block's largest magnitude into [0.5, 1). One that the format can't say (a
// block of fp32 denormals, or of magnitudes of 2^127 and more) makes the block raw.
KVS_FN int BlockExponent(float largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  return exponent;
}

// 2^exponent as a product of two floats: one alone may be out of a float's range, or denormal.
struct PowerOfTwo {
  float first = 1;
  float second = 1;

  explicit PowerOfTwo(int exponent)
      : first(std::ldexp(1.0F, exponent / 2)), second(std::ldexp(1.0F, exponent - exponent / 2)) {}
  float Times(float x) const { return x * first * second; }
};

}  // namespace kvshrink::stages
