// Parts of the leading-subspace iteration that don't depend on how a backend multiplies (codec
// rule: 16 fixed probes, 3 rounds of X^T (X .), orthonormalised each round, then Rayleigh-Ritz).
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "stages/rotate.h"

namespace kvshrink::stages {

inline constexpr int kProbes = 16;
inline constexpr int kSubspaceRounds = 3;
inline constexpr uint32_t kProbeSeed = 16;  // rows of signs 16 .. 31

// Start of the iteration: entry `channel` of probe `probe`, fixed for all blocks.
KVS_FN float ProbeEntry(uint32_t probe, uint32_t channel) {
  return SignIsNegative(kProbeSeed + probe, channel) ? -1.0F : 1.0F;
}

// One step of Cholesky-QR: from the Gram matrix g = Z^T Z of `kProbes` columns, row-major, the
// upper triangular w for which the columns of Z w are orthonormal; a column that the earlier ones
// span (what is left of it is below `floor` of its square) becomes zero. One step loses
// orthogonality by the condition of Z, a second one restores it: do it twice where it matters.
KVS_FN void OrthonormalisingFactor(const double* g, double floor, double* w) {
  std::array<double, size_t{kProbes} * kProbes> r{};  // upper triangular, g = r^T r
  std::array<double, kProbes> inverse{};
  for (int i = 0; i < kProbes; ++i) {
    for (int j = i; j < kProbes; ++j) {
      double sum = g[i * kProbes + j];
      for (int k = 0; k < i; ++k) {
        sum -= r[static_cast<size_t>(k * kProbes + i)] * r[static_cast<size_t>(k * kProbes + j)];
      }
      if (i == j) {
        inverse[static_cast<size_t>(i)] = sum > floor * g[i * kProbes + i] ? 1 / std::sqrt(sum) : 0;
      }
      r[static_cast<size_t>(i * kProbes + j)] = sum * inverse[static_cast<size_t>(i)];
    }
  }
  for (int j = 0; j < kProbes; ++j) {
    for (int i = kProbes - 1; i >= 0; --i) {
      double sum = i == j ? 1 : 0;
      for (int k = i + 1; k <= j; ++k) {
        sum -= r[static_cast<size_t>(i * kProbes + k)] * w[k * kProbes + j];
      }
      w[i * kProbes + j] = i > j ? 0 : sum * inverse[static_cast<size_t>(i)];
    }
  }
}

}  // namespace kvshrink::stages
