#include "cpu/cpu_decoder.h"

#include <algorithm>
#include <limits>

#include "block_checks.h"
#include "cpu/rotation_signs.h"
#include "format/layout.h"
#include "stages/eoptshrink.h"
#include "stages/exponent.h"
#include "stages/minifloat.h"
#include "stages/row_scales.h"

namespace kvshrink::cpu {
namespace {

// Times 2^exponent; what is too large becomes the largest finite value.
void ScaleUp(int exponent, std::vector<float>* values) {
  const stages::PowerOfTwo up(exponent);
  for (float& value : *values) {
    value = up.Times(value);
  }
}

void ScaleUpSaturating(int exponent, float* values, size_t count) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const stages::PowerOfTwo up(exponent);
  for (size_t i = 0; i < count; ++i) {
    values[i] = std::clamp(up.Times(values[i]), -kLargest, kLargest);
  }
}

}  // namespace

absl::Status CpuDecoder::ReadFactors(Family family, const BlockView& block, uint32_t d,
                                     std::vector<float>* token, std::vector<float>* channel) {
  const uint32_t n = block.rows;
  const uint32_t rank = block.rank;
  if (family == Family::kEOptShrinkQ) {
    if (!stages::ReadEOptShrinkFactors(block.factors, rank, n, d, token, channel)) {
      return BadBlock(block, "factor", "a number isn't finite");
    }
  } else {
    if (!over_channels_.has_value() || over_channels_->length() != d) {
      over_channels_.emplace(stages::kChannelSeed, d);
    }
    if (!over_tokens_.has_value() || over_tokens_->length() != n) {
      over_tokens_.emplace(stages::kTokenSeed, n);
    }
    stages::ReadKvsFactors(block.factors, rank, n, d, &components_);
    token->resize(size_t{n} * rank);
    channel->resize(size_t{rank} * d);
    column_.resize(n);
    for (uint32_t i = 0; i < rank; ++i) {
      const stages::KvsComponent& component = components_[i];
      stages::DecodeChannelFactor(*over_channels_, component.bits.channel, component.channel,
                                  channel->data() + size_t{i} * d);
      stages::DecodeTokenFactor(*over_tokens_, component.bits.token, component.scale,
                                component.token, column_.data());
      for (uint32_t t = 0; t < n; ++t) {
        (*token)[size_t{t} * rank + i] = column_[t];
      }
    }
  }
  token->erase(token->begin(),
               token->begin() + static_cast<std::ptrdiff_t>(size_t{block.raw_rows} * rank));
  return absl::OkStatus();
}

absl::Status CpuDecoder::ReadResidual(Family family, const BlockView& block, uint32_t d,
                                      float* rows) {
  const uint32_t m = block.coded_rows();
  const size_t count = size_t{m} * d;
  scales_.resize(m);
  if (!stages::ReadRowScales<float>(family, d, block.scales, scales_)) {
    return BadBlock(block, "scale",
                    "a row scale is negative or not finite, or the step is out of range");
  }
  if (const stages::TrellisCode* trellis = stages::TrellisOf(block.code)) {
    levels_.resize(stages::RunsOf(count) * stages::kRunValues);
    stages::ReadTrellisRuns(*trellis, block.codes.data(), count, levels_.data());
    for (uint32_t t = 0; t < m; ++t) {
      const size_t start = size_t{t} * d;
      trellis_loops_.expand(levels_.data() + start, scales_[t], d, rows + start);
    }
    return absl::OkStatus();
  }
  digits_.resize(count);
  if (!stages::UnpackDigits(block.code, block.codes, digits_)) {
    return BadBlock(block, "codes", "a group's number is out of range");
  }
  const stages::Codebook& codebook = *stages::CodebookOf(block.code);
  for (uint32_t t = 0; t < m; ++t) {
    loops_.expand(codebook, digits_.data() + size_t{t} * d, scales_[t], d, rows + size_t{t} * d);
  }
  return absl::OkStatus();
}

absl::Status CpuDecoder::ReadFp8(const BlockView& block, float* rows) {
  bool valid = true;
  for (size_t i = 0; i < block.codes.size(); ++i) {
    valid &= !stages::Fp8IsNan(block.codes[i]);
    rows[i] = stages::Fp8ToFloat(block.codes[i]) / 256;
  }
  return valid ? absl::OkStatus() : BadBlock(block, "codes", "holds a NaN");
}

absl::Status CpuDecoder::Unpack(Family family, const BlockView& block, uint32_t d, DecodeForm form,
                                Backend::UnpackedBlock* out) {
  const bool levels = format::IsLevelCode(block.code);
  out->rank = levels ? block.rank : 0;
  out->rotated = levels && form == DecodeForm::kFull;
  out->residual.assign(size_t{block.coded_rows()} * d, 0.0F);
  out->token_factors.clear();
  out->channel_factors.clear();
  if (form == DecodeForm::kFull && levels) {
    KVSHRINK_RETURN_IF_ERROR(ReadResidual(family, block, d, out->residual.data()));
  } else if (form == DecodeForm::kFull && block.code == BlockCode::kFp8) {
    KVSHRINK_RETURN_IF_ERROR(ReadFp8(block, out->residual.data()));
  }
  if (out->rank > 0) {
    KVSHRINK_RETURN_IF_ERROR(
        ReadFactors(family, block, d, &out->token_factors, &out->channel_factors));
  }
  ScaleUp(block.exponent, &out->token_factors);
  ScaleUp(block.exponent, &out->residual);
  return absl::OkStatus();
}

absl::Status CpuDecoder::Decode(Family family, const BlockView& block, uint32_t d, DecodeForm form,
                                float* rows) {
  const uint32_t m = block.coded_rows();
  const size_t count = size_t{m} * d;
  std::fill(rows, rows + count, 0.0F);
  if (block.code == BlockCode::kFp8 && form == DecodeForm::kFull) {
    KVSHRINK_RETURN_IF_ERROR(ReadFp8(block, rows));
  }
  if (format::IsLevelCode(block.code)) {
    if (form == DecodeForm::kFull) {
      KVSHRINK_RETURN_IF_ERROR(ReadResidual(family, block, d, rows));
      if (d != d_) {
        d_ = d;
        row_signs_ = MakeSigns(stages::kRowSeed, d);
      }
      loops_.rotate_inverse(row_signs_.data(), m, d, rows);
    }
    if (block.rank > 0) {
      KVSHRINK_RETURN_IF_ERROR(ReadFactors(family, block, d, &token_, &channel_));
      loops_.add_low_rank(token_.data(), block.rank, channel_.data(), block.rank, 1.0F, m, d, rows);
    }
  }
  ScaleUpSaturating(block.exponent, rows, count);
  return absl::OkStatus();
}

}  // namespace kvshrink::cpu
