// The encoder's stages on a CPU, in float. `Stages` of block_pipeline.h.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "block_plan.h"
#include "cpu/loops.h"
#include "cpu/trellis_loops.h"
#include "kvshrink/codec.h"
#include "stages/kvs_factors.h"
#include "stages/rank_rule.h"

namespace kvshrink::cpu {

// Buffers are kept from block to block: one object per thread.
class CpuStages {
 public:
  void Load(const Backend::BlockInput& in, int exponent);
  double energy() const { return energy_; }
  std::vector<double> FindSpectrum();
  void CodeLowRank(Family family, Backend::BlockOutput* out);
  double CodeResidual(Family family, BlockCode code, std::vector<uint8_t>* scales,
                      std::vector<uint8_t>* codes);

 private:
  void SetShape(uint32_t n, uint32_t d);
  // Leading eigenpairs of X^T X: `lambda_` (descending) and the columns of `basis_`.
  void FindSubspace();
  void Orthonormalise();
  void CodeKvsFactors(const stages::RankChoice& choice, Backend::BlockOutput* out);
  void CodeChannelFactors(const stages::RankChoice& choice);
  void CodeTokenFactors(const stages::RankChoice& choice);
  void CodeEOptShrink(Backend::BlockOutput* out);
  void Rotate(std::vector<float>* rows) const;
  // The coded rows against `row_scales_` as a decoder gets them. Return the sum of squared error.
  double CodeDigits(BlockCode code, std::vector<uint8_t>* codes);
  double CodeTrellis(const stages::TrellisCode& code, std::vector<uint8_t>* codes);

  const Loops& loops_ = ChooseLoops();
  const TrellisLoops& trellis_loops_ = ChooseTrellisLoops();
  uint32_t n_ = 0, d_ = 0, raw_rows_ = 0, m_ = 0;
  Kind kind_ = Kind::kKey;
  const BlockPlan* plan_ = nullptr;
  double energy_ = 0;
  std::vector<float> x_;      // n x d: the scaled block, then its residual
  std::vector<float> coded_;  // m x d, rotated residual
  std::vector<float>
      error_target_;  // m x d, rotated, where it is not the coded residual (open loop)
  std::vector<float> row_signs_;
  std::optional<stages::Rotation<float>> over_channels_, over_tokens_;

  std::vector<float> probes_, basis_, next_basis_;  // d x 16
  std::vector<float> projected_;                    // n x 16
  std::array<double, stages::kProbes> lambda_{};
  std::vector<float> channel_;  // rank x d as decoded
  std::vector<float> token_;    // rank x n as decoded
  std::vector<stages::KvsComponent> components_;

  std::vector<uint8_t> digits_;
  std::vector<float> row_scales_;
  std::vector<stages::RowSums<float>> sums_;
  std::vector<float> normal_;   // coded rows over their scales, to whole runs
  std::vector<int8_t> levels_;  // what a decoder reads of them
  std::unique_ptr<stages::TrellisScratch<float>> trellis_scratch_;  // made when first needed
};

// Thread-local storage is part of the stack of every thread of the process, small ones too.
static_assert(sizeof(CpuStages) <= 2048);

}  // namespace kvshrink::cpu
