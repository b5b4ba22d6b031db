// The way of one block through the stages of an encoder, and its decisions: the same for every
// backend. A backend brings `Stages`:
//   void Load(const Backend::BlockInput& in, int exponent)
//       coded rows times 2^-exponent, raw rows as zeros
//   double energy() const
//       sum of squares of what was loaded
//   std::vector<double> FindSpectrum()
//       largest squared singular values of what was loaded, descending
//   void CodeLowRank(Family family, Backend::BlockOutput* out)
//       sets rank and factors; leaves the rotated residual
//   double CodeResidual(Family family, BlockCode code, std::vector<uint8_t>* scales,
//                       std::vector<uint8_t>* codes)
//       returns the sum of squared error; may be called again with another code
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "block_plan.h"
#include "format/layout.h"
#include "kvshrink/codec.h"
#include "stages/digits.h"
#include "stages/exponent.h"
#include "stages/minifloat.h"
#include "stages/trellis.h"

namespace kvshrink {

// The codes that a profile climbs when a block's error is over the bound: its own and those above.
inline std::vector<BlockCode> LevelLadder(Profile profile) {
  using enum BlockCode;
  const ProfileInfo& info = GetProfileInfo(profile);
  std::vector<BlockCode> ladder = {kLevels3, kLevels4,  kLevels5, kLevels6,
                                   kLevels8, kLevels12, kLevels16};
  if (stages::TrellisOf(info.code) != nullptr) {
    ladder = {kTrellis15, kTrellis20, kTrellis25, kTrellis30, kLevels12, kLevels16};
  }
  ladder.erase(ladder.begin(), std::find(ladder.begin(), ladder.end(), info.code));
  std::erase_if(ladder, [&](BlockCode code) { return !format::FamilyHasCode(info.family, code); });
  return ladder;
}

// The codes that a rate target chooses from: those of the profile's kind, coarsest first.
inline std::vector<BlockCode> RateCodes(Profile profile) {
  const bool trellis = stages::TrellisOf(GetProfileInfo(profile).code) != nullptr;
  return LevelLadder(trellis ? Profile::kKvs2t : Profile::kKvs2);
}

// Mean squared error of N(0, 1) in a residual code.
inline double DistortionOf(BlockCode code) {
  const stages::TrellisCode* trellis = stages::TrellisOf(code);
  return trellis != nullptr ? trellis->distortion : stages::CodebookOf(code)->distortion;
}

inline void KeepRaw(Backend::BlockOutput* out) {
  out->code = BlockCode::kRaw;
  out->exponent = 0;
  out->rank = 0;
  out->factors.clear();
  out->scales.clear();
  out->codes.clear();
  out->error_energy = 0;
  out->escalated = false;
}

// Family fp8: one byte a value, relative to the block's exponent.
inline void EncodeFp8(const float* coded, size_t count, Backend::BlockOutput* out) {
  const stages::PowerOfTwo down(-out->exponent);
  out->code = BlockCode::kFp8;
  out->codes.resize(count);
  double error = 0;
  for (size_t i = 0; i < count; ++i) {
    const float scaled = down.Times(coded[i]) * 256;
    out->codes[i] = stages::FloatToFp8(scaled);
    const double difference =
        (static_cast<double>(scaled) - static_cast<double>(stages::Fp8ToFloat(out->codes[i]))) /
        256;
    error += difference * difference;
  }
  out->error_energy = std::ldexp(error, 2 * out->exponent);
}

template <typename Stages>
void EncodeLevels(const Backend::BlockSettings& settings, Family family,
                  const Backend::BlockInput& in, Stages* stages, Backend::BlockOutput* out) {
  stages->Load(in, out->exponent);
  stages->CodeLowRank(family, out);
  const double bound = settings.max_relative_error > 0
                           ? settings.max_relative_error * stages->energy()
                           : std::numeric_limits<double>::infinity();
  const std::vector<BlockCode> ladder =
      in.plan != nullptr ? std::vector<BlockCode>{in.plan->code} : LevelLadder(settings.profile);
  for (size_t step = in.skipped_codes; step < ladder.size(); ++step) {
    const BlockCode code = ladder[step];
    out->code = code;
    out->scales.clear();
    out->codes.clear();
    const double error = stages->CodeResidual(family, code, &out->scales, &out->codes);
    out->error_energy = std::ldexp(error, 2 * out->exponent);
    if (error <= bound) {
      out->escalated = code != ladder.front();
      return;
    }
  }
  KeepRaw(out);
}

// What is settled by a block's range alone: true when it is to be coded, with its exponent in
// `out`.
inline bool BeginBlock(Family family, const Backend::BlockInput& in, Backend::BlockOutput* out) {
  *out = Backend::BlockOutput{};
  const float* coded = in.rows + in.raw_rows * in.d;
  const size_t count = size_t{in.n - in.raw_rows} * in.d;
  const stages::BlockRange range = stages::RangeOf(coded, count);
  out->energy = range.finite ? stages::SumOfSquares(coded, count) : 0;
  if (count == 0 || (range.largest == 0 && range.finite && family != Family::kRaw)) {
    return false;  // all zero
  }
  const int exponent = range.finite ? stages::BlockExponent(range.largest) : 0;
  if (family == Family::kRaw || !range.finite || exponent < format::kMinExponent ||
      exponent > format::kMaxExponent) {
    KeepRaw(out);
    return false;
  }
  out->exponent = exponent;
  return true;
}

template <typename Stages>
void AnalyseBlock(const Backend::BlockSettings& settings, const Backend::BlockInput& in,
                  Stages* stages, Backend::BlockSpectrum* out) {
  *out = Backend::BlockSpectrum{};
  Backend::BlockOutput block;
  out->coded = BeginBlock(GetProfileInfo(settings.profile).family, in, &block);
  out->code = block.code;
  out->energy = block.energy;
  if (!out->coded) {
    return;
  }
  stages->Load(in, block.exponent);
  const std::vector<double> lambda = stages->FindSpectrum();
  out->count = static_cast<int>(std::min(lambda.size(), out->lambda.size()));
  for (int i = 0; i < out->count; ++i) {
    out->lambda[static_cast<size_t>(i)] =
        std::ldexp(lambda[static_cast<size_t>(i)], 2 * block.exponent);
  }
}

template <typename Stages>
void EncodeBlock(const Backend::BlockSettings& settings, const Backend::BlockInput& in,
                 Stages* stages, Backend::BlockOutput* out) {
  const Family family = GetProfileInfo(settings.profile).family;
  if (!BeginBlock(family, in, out)) {
    return;
  }
  if (in.plan != nullptr && in.plan->code == BlockCode::kRaw) {
    return KeepRaw(out);
  }
  const size_t count = size_t{in.n - in.raw_rows} * in.d;
  if (family == Family::kFp8) {
    EncodeFp8(in.rows + in.raw_rows * in.d, count, out);
    if (settings.max_relative_error > 0 &&
        out->error_energy > settings.max_relative_error * out->energy) {
      KeepRaw(out);
    }
  } else {
    EncodeLevels(settings, family, in, stages, out);
  }
  if (PaddedBytes(out->factors.size()) + PaddedBytes(out->scales.size()) +
          PaddedBytes(out->codes.size()) >=
      count * settings.raw_value_bytes) {
    KeepRaw(out);
  }
}

}  // namespace kvshrink
