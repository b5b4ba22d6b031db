// The encoder's stages in the order of the specification, scalar and in double. `Stages` of
// block_pipeline.h.
#pragma once

#include <Eigen/Dense>
#include <cstdint>
#include <vector>

#include "block_plan.h"
#include "kvshrink/codec.h"
#include "stages/rank_rule.h"
#include "stages/trellis.h"

namespace kvshrink::reference {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

class ReferenceStages {
 public:
  // exact: eigenpairs from a dense solver in place of the subspace iteration.
  explicit ReferenceStages(bool exact) : exact_(exact) {}

  void Load(const Backend::BlockInput& in, int exponent);
  double energy() const { return x_.squaredNorm(); }
  std::vector<double> FindSpectrum() const { return LeadingEigenpairs().values; }
  void CodeLowRank(Family family, Backend::BlockOutput* out);
  double CodeResidual(Family family, BlockCode code, std::vector<uint8_t>* scales,
                      std::vector<uint8_t>* codes) const;

 private:
  // Eigenvalues (descending) and eigenvectors (columns) of X^T X, as many as the rank rule may
  // need.
  struct Spectrum {
    std::vector<double> values;
    Matrix vectors;  // d x count
  };
  Spectrum LeadingEigenpairs() const;
  Spectrum ExactEigenpairs() const;
  // What a decoder makes of the factors; fills `out`'s record.
  Matrix CodeKvsFactors(const Spectrum& spectrum, const stages::RankChoice& choice,
                        Backend::BlockOutput* out) const;
  void Rotate(Matrix* rows) const;
  // The coded rows against the scales that a decoder gets. Return the sum of squared error.
  double CodeDigits(BlockCode code, const std::vector<double>& row_scales,
                    std::vector<uint8_t>* codes) const;
  double CodeTrellis(const stages::TrellisCode& code, const std::vector<double>& row_scales,
                     std::vector<uint8_t>* codes) const;

  bool exact_;
  uint32_t raw_rows_ = 0;
  Kind kind_ = Kind::kKey;
  const BlockPlan* plan_ = nullptr;
  Matrix x_;             // n x d, scaled, raw rows zero
  Matrix residual_;      // m x d, rotated: what is coded
  Matrix error_target_;  // m x d, rotated: what the coded residual should have been, given the
                         // factors as decoded
};

}  // namespace kvshrink::reference
