// The low-rank stage of the paper read literally (profile eoptshrinkq2): exact spectrum, rank by
// the BBP threshold over an estimated bulk edge, optimal shrinkage under Frobenius loss, factors in
// 4 bits with a codebook fitted to the block. Sources: eOptShrinkQ (arXiv 2605.02905) for the use,
// eOptShrink (arXiv 2207.03466) for rank and shrinkage; the sign of the companion transform follows
// the derivation there, not its printed formula. Always double: this is the baseline that others
// are measured against.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvshrink::stages {

struct ShrinkageResult {
  int rank = 0;
  double bulk_edge = 0;
  std::vector<double> shrunk;  // phi_i, i < rank
};

// lambda: all p eigenvalues of the smaller Gram matrix (squared singular values), descending; q =
// max(n, d).
ShrinkageResult OptimalShrinkage(std::span<const double> lambda, int q);

struct EOptShrinkFactors {
  int rank = 0;
  std::vector<double> low;  // n x d, U diag(phi) V^T before coding: the residual of this open-loop
                            // codec is taken against it
  std::vector<uint8_t> record;  // FORMAT.md section 5.3; empty when rank = 0
};

// x: n x d row-major.
EOptShrinkFactors CodeEOptShrinkFactors(const double* x, int n, int d);

// Token factors phi_i U_i as an n x rank matrix and channel factors V_i as rank x d. The size of
// the record has been checked. False when a number isn't finite.
bool ReadEOptShrinkFactors(std::span<const uint8_t> record, uint32_t rank, uint32_t n, uint32_t d,
                           std::vector<float>* token, std::vector<float>* channel);

constexpr size_t EOptShrinkFactorBytes(size_t rank, size_t n, size_t d) {
  return rank == 0 ? 0 : 2 * rank + 64 + (4 * rank * (n + d) + 7) / 8;
}

}  // namespace kvshrink::stages
