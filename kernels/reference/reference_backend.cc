// The oracle: see codec.h.
#include <cmath>

#include "block_checks.h"
#include "block_pipeline.h"
#include "kvshrink/codec.h"
#include "reference/reference_encoder.h"
#include "stages/eoptshrink.h"
#include "stages/kvs_factors.h"
#include "stages/row_scales.h"
#include "stages/trellis.h"

namespace kvshrink {
namespace {

using reference::Matrix;

// The low-rank part of all n rows. False when a stored number isn't finite.
bool ReadLowRank(Family family, const BlockView& block, uint32_t d, Matrix* low) {
  const uint32_t n = block.rows;
  *low = Matrix::Zero(n, d);
  if (block.rank == 0) {
    return true;
  }
  if (family == Family::kEOptShrinkQ) {
    std::vector<float> token;
    std::vector<float> channel;
    const bool valid =
        stages::ReadEOptShrinkFactors(block.factors, block.rank, n, d, &token, &channel);
    const Eigen::Map<const Eigen::Matrix<float, -1, -1, Eigen::RowMajor>> u(token.data(), n,
                                                                            block.rank);
    const Eigen::Map<const Eigen::Matrix<float, -1, -1, Eigen::RowMajor>> v(channel.data(),
                                                                            block.rank, d);
    *low = u.cast<double>() * v.cast<double>();
    return valid;
  }
  const stages::Rotation<double> over_channels(stages::kChannelSeed, d);
  const stages::Rotation<double> over_tokens(stages::kTokenSeed, n);
  std::vector<stages::KvsComponent> components;
  stages::ReadKvsFactors(block.factors, block.rank, n, d, &components);
  Eigen::VectorXd v(d);
  Eigen::VectorXd a(n);
  for (const stages::KvsComponent& component : components) {
    stages::DecodeChannelFactor(over_channels, component.bits.channel, component.channel, v.data());
    stages::DecodeTokenFactor(over_tokens, component.bits.token, component.scale, component.token,
                              a.data());
    *low += a * v.transpose();
  }
  return true;
}

absl::Status ReadResidual(Family family, const BlockView& block, uint32_t d, Matrix* residual) {
  const uint32_t m = block.coded_rows();
  const size_t count = size_t{m} * d;
  std::vector<double> scales(m);
  if (!stages::ReadRowScales<double>(family, d, block.scales, scales)) {
    return BadBlock(block, "scale",
                    "a row scale is negative or not finite, or the step is out of range");
  }
  *residual = Matrix(m, d);
  if (const stages::TrellisCode* trellis = stages::TrellisOf(block.code)) {
    std::vector<int8_t> levels(stages::RunsOf(count) * stages::kRunValues);
    stages::ReadTrellisRuns(*trellis, block.codes.data(), count, levels.data());
    for (size_t i = 0; i < count; ++i) {
      residual->data()[i] = double{stages::kTrellisUnit} * levels[i];
    }
  } else {
    std::vector<uint8_t> digits(count);
    if (!stages::UnpackDigits(block.code, block.codes, digits)) {
      return BadBlock(block, "codes", "a group's number is out of range");
    }
    for (size_t i = 0; i < count; ++i) {
      residual->data()[i] = static_cast<double>(stages::CodebookOf(block.code)->level[digits[i]]);
    }
  }
  const stages::Rotation<double> rotation(stages::kRowSeed, d);
  for (uint32_t t = 0; t < m; ++t) {
    residual->row(t) *= scales[t];
    rotation.ApplyInverse(residual->row(t).data());
  }
  return absl::OkStatus();
}

absl::Status ReadFp8(const BlockView& block, Matrix* rows) {
  for (size_t i = 0; i < block.codes.size(); ++i) {
    if (stages::Fp8IsNan(block.codes[i])) {
      return BadBlock(block, "codes", "holds a NaN");
    }
    rows->data()[i] = static_cast<double>(stages::Fp8ToFloat(block.codes[i])) / 256;
  }
  return absl::OkStatus();
}

// The coded rows before the block's exponent.
absl::StatusOr<Matrix> ReadRows(Family family, const BlockView& block, uint32_t d,
                                DecodeForm form) {
  Matrix rows = Matrix::Zero(block.coded_rows(), d);
  if (block.code == BlockCode::kFp8 && form == DecodeForm::kFull) {
    KVSHRINK_RETURN_IF_ERROR(ReadFp8(block, &rows));
  }
  if (!format::IsLevelCode(block.code)) {
    return rows;
  }
  if (form == DecodeForm::kFull) {
    KVSHRINK_RETURN_IF_ERROR(ReadResidual(family, block, d, &rows));
  }
  Matrix low;
  if (!ReadLowRank(family, block, d, &low)) {
    return BadBlock(block, "factor", "a number isn't finite");
  }
  return Matrix(rows + low.bottomRows(rows.rows()));
}

class ReferenceBackend final : public Backend {
 public:
  explicit ReferenceBackend(bool exact) : exact_(exact) {}

  std::string_view name() const override { return exact_ ? "reference-exact" : "reference"; }

  void AnalyseBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                     std::span<BlockSpectrum> out) const override {
    for (size_t i = 0; i < in.size(); ++i) {
      reference::ReferenceStages stages(exact_);
      AnalyseBlock(settings, in[i], &stages, &out[i]);
    }
  }

  void EncodeBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                    std::span<BlockOutput> out) const override {
    for (size_t i = 0; i < in.size(); ++i) {
      reference::ReferenceStages stages(exact_);
      EncodeBlock(settings, in[i], &stages, &out[i]);
    }
  }

  absl::Status UnpackBlock(Family family, const BlockView& block, uint32_t head_dim,
                           DecodeForm form, UnpackedBlock* out) const override {
    out->rank = 0;
    out->rotated = false;
    out->token_factors.clear();
    out->channel_factors.clear();
    out->residual.resize(size_t{block.coded_rows()} * head_dim);
    return DecodeBlock(family, block, head_dim, form, out->residual.data());
  }

  absl::Status DecodeBlock(Family family, const BlockView& block, uint32_t head_dim,
                           DecodeForm form, float* rows) const override {
    const absl::StatusOr<Matrix> decoded = ReadRows(family, block, head_dim, form);
    KVSHRINK_RETURN_IF_ERROR(decoded.status());
    for (Eigen::Index i = 0; i < decoded->size(); ++i) {
      rows[i] = static_cast<float>(std::ldexp(decoded->data()[i], block.exponent));
    }
    return absl::OkStatus();
  }

 private:
  bool exact_;
};

}  // namespace

std::unique_ptr<Backend> MakeReferenceBackend(bool exact) {
  return std::make_unique<ReferenceBackend>(exact);
}

}  // namespace kvshrink
