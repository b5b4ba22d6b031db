// The factor record of the kvs family: coding of channel and token factors, and the solve between
// them. T is double in the reference, float elsewhere. Format: proto/FORMAT.md section 5.4.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "stages/codebook.h"
#include "stages/digits.h"
#include "stages/rank_rule.h"
#include "stages/rotate.h"
#include "stages/scales.h"

namespace kvshrink::stages {

// Digits of one factor of one component.
using FactorDigits = std::vector<uint8_t>;

// In: unit vector of length d. Out: its digits, and the vector as decoded (in place).
template <typename T>
void CodeChannelFactor(const Rotation<T>& rotation, int bits, T* v, FactorDigits* digits) {
  const Codebook& codebook = FactorCodebook(bits);
  const uint32_t d = rotation.length();
  rotation.Apply(v);
  const T scale = std::sqrt(static_cast<T>(d));
  digits->resize(d);
  for (uint32_t c = 0; c < d; ++c) {
    (*digits)[c] = static_cast<uint8_t>(NearestDigit(codebook, v[c] * scale));
  }
}

// Unit vector of length d from its digits.
template <typename T>
void DecodeChannelFactor(const Rotation<T>& rotation, int bits, const FactorDigits& digits, T* v) {
  const Codebook& codebook = FactorCodebook(bits);
  T energy = T{0};
  for (size_t c = 0; c < digits.size(); ++c) {
    v[c] = static_cast<T>(codebook.level[digits[c]]);
    energy += v[c] * v[c];
  }
  const T inverse = T{1} / std::sqrt(energy);  // no level of an even alphabet is zero
  for (size_t c = 0; c < digits.size(); ++c) {
    v[c] *= inverse;
  }
  rotation.ApplyInverse(v);
}

// In: a column of token coefficients of length n. Out: scale byte and digits; `a` is left rotated.
template <typename T>
uint8_t CodeTokenFactor(const Rotation<T>& rotation, int bits, T* a, FactorDigits* digits) {
  const Codebook& codebook = FactorCodebook(bits);
  const uint32_t n = rotation.length();
  rotation.Apply(a);
  T energy = T{0};
  for (uint32_t t = 0; t < n; ++t) {
    energy += a[t] * a[t];
  }
  const uint8_t scale = EncodeScale8(std::sqrt(energy / static_cast<T>(n)));
  const T inverse = T{1} / DecodeScale8<T>(scale);
  digits->resize(n);
  for (uint32_t t = 0; t < n; ++t) {
    (*digits)[t] = static_cast<uint8_t>(NearestDigit(codebook, a[t] * inverse));
  }
  return scale;
}

template <typename T>
void DecodeTokenFactor(const Rotation<T>& rotation, int bits, uint8_t scale,
                       const FactorDigits& digits, T* a) {
  const Codebook& codebook = FactorCodebook(bits);
  const T factor = DecodeScale8<T>(scale);
  for (size_t t = 0; t < digits.size(); ++t) {
    a[t] = factor * static_cast<T>(codebook.level[digits[t]]);
  }
  rotation.ApplyInverse(a);
}

// Solves G w = b in place for a symmetric positive definite G of order `order` (row-major,
// `stride`), for `count` right-hand sides: side j, entry i at b[i * b_stride + j]. G is overwritten
// with its Cholesky factor. A pivot below 1e-6 of its diagonal entry marks channel factors that are
// dependent as coded; its row is dropped (solution 0).
template <typename T>
void SolveGram(T* g, int order, int stride, T* b, size_t b_stride, size_t count) {
  std::array<T, kRankCap> inverse{};
  for (int i = 0; i < order; ++i) {
    for (int j = 0; j <= i; ++j) {
      T sum = g[i * stride + j];
      for (int k = 0; k < j; ++k) {
        sum -= g[i * stride + k] * g[j * stride + k];
      }
      if (i == j) {
        inverse[static_cast<size_t>(i)] =
            sum > T(1e-6) * g[i * stride + i] ? T{1} / std::sqrt(sum) : T{0};
      }
      g[i * stride + j] = i == j ? sum : sum * inverse[static_cast<size_t>(j)];
    }
  }
  for (int i = 0; i < order; ++i) {
    T* row = b + static_cast<size_t>(i) * b_stride;
    for (int k = 0; k < i; ++k) {
      const T* other = b + static_cast<size_t>(k) * b_stride;
      for (size_t j = 0; j < count; ++j) {
        row[j] -= g[i * stride + k] * other[j];
      }
    }
    for (size_t j = 0; j < count; ++j) {
      row[j] *= inverse[static_cast<size_t>(i)];
    }
  }
  for (int i = order - 1; i >= 0; --i) {
    T* row = b + static_cast<size_t>(i) * b_stride;
    for (int k = i + 1; k < order; ++k) {
      const T* other = b + static_cast<size_t>(k) * b_stride;
      for (size_t j = 0; j < count; ++j) {
        row[j] -= g[k * stride + i] * other[j];
      }
    }
    for (size_t j = 0; j < count; ++j) {
      row[j] *= inverse[static_cast<size_t>(i)];
    }
  }
}

// One component of a factor record.
struct KvsComponent {
  FactorBits bits;
  uint8_t scale = 0;
  FactorDigits channel, token;
};

// Bytes of a record with these bit counts.
size_t KvsFactorBytes(std::span<const FactorBits> bits, uint32_t n, uint32_t d);
void WriteKvsFactors(std::span<const KvsComponent> components, std::vector<uint8_t>* out);
// The record has passed the checks of the shard reader.
void ReadKvsFactors(std::span<const uint8_t> record, uint32_t rank, uint32_t n, uint32_t d,
                    std::vector<KvsComponent>* components);

}  // namespace kvshrink::stages
