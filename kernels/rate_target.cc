#include "rate_target.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "block_pipeline.h"
#include "format/extensions.h"
#include "format/layout.h"
#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "stages/kvs_factors.h"

namespace kvshrink {
namespace {

// Multiples of the rank rule's price that a block may be coded at; the last stands for no low rank.
constexpr std::array<double, 8> kPrices = {0.5, 0.7, 0.85, 1, 1.3, 1.7, 2.5, 1e9};

// What an error of K costs beside one of V (Weights): measured on the attention outputs of real
// traces, flat between 1 and 3.
constexpr double kKeyWeight = 2;

// One way to code a block.
struct Option {
  uint64_t bytes = 0;
  double cost = 0;  // estimated error, weighted
  BlockCode code = BlockCode::kRaw;
  uint8_t price = 0;
};

stages::RankChoice ChoiceAt(const BlockView& place, const Backend::BlockSpectrum& spectrum,
                            uint32_t d, double price) {
  stages::RankPolicy policy = stages::RankPolicyOf(place.kind);
  policy.price *= price;
  return stages::ChooseRank(spectrum.lambda.data(), spectrum.count, spectrum.energy,
                            static_cast<int>(place.rows), static_cast<int>(d), policy);
}

// What an error of one block's values costs, per unit of squared error. An error of V goes into the
// outputs as it is. One of K moves the weights of a head's tokens, which moves its output by as
// much of V's size as the error is of the keys' own variation: their energy but for the leading
// component, which attention hardly feels, as it moves all logits alike.
class Weights {
 public:
  Weights(const ShardHeader& header, std::span<const BlockView> places,
          std::span<const Backend::BlockSpectrum> spectra)
      : values_(header.shape.kv_heads), keys_(header.shape.kv_heads) {
    for (size_t i = 0; i < places.size(); ++i) {
      if (places[i].kind == Kind::kValue) {
        values_[places[i].head] += spectra[i].energy;
        all_values_ += spectra[i].energy;
      } else {
        keys_[places[i].head] += std::max(0.0, spectra[i].energy - spectra[i].lambda[0]);
      }
    }
  }

  double Of(const BlockView& place) const {
    const double variation = keys_[place.head];
    if (!(all_values_ > 0)) {
      return variation > 0 ? 1 / variation : 1;  // keys only: the heads' logits count alike
    }
    if (place.kind == Kind::kValue) {
      return 1 / all_values_;
    }
    return variation > 0 ? kKeyWeight * values_[place.head] / all_values_ / variation : 0;
  }

 private:
  std::vector<double> values_, keys_;  // energies by head
  double all_values_ = 0;
};

uint64_t PartBytes(const ShardHeader& header, const BlockView& place, BlockCode code,
                   size_t factor_bytes) {
  const uint32_t d = header.shape.head_dim;
  const size_t raw = size_t{place.raw_rows} * d * DTypeBytes(header.dtype);
  return PaddedBytes(raw + factor_bytes) +
         PaddedBytes(format::ScaleBytes(Family::kKvs, code, place.coded_rows())) +
         PaddedBytes(format::CodeBytes(code, place.coded_rows(), d, header.dtype));
}

// Options whose cost falls fastest, from the smallest on: the lower convex hull.
std::vector<Option> Hull(std::vector<Option> options) {
  std::stable_sort(options.begin(), options.end(), [](const Option& a, const Option& b) {
    return a.bytes != b.bytes ? a.bytes < b.bytes : a.cost < b.cost;
  });
  std::vector<Option> hull;
  for (const Option& option : options) {
    if (!hull.empty() && option.cost >= hull.back().cost) {
      continue;
    }
    const auto slope = [](const Option& from, const Option& to) {
      return (from.cost - to.cost) / static_cast<double>(to.bytes - from.bytes);
    };
    while (!hull.empty() && hull.back().bytes == option.bytes) {
      hull.pop_back();
    }
    while (hull.size() > 1 &&
           slope(hull[hull.size() - 2], hull.back()) <= slope(hull.back(), option)) {
      hull.pop_back();
    }
    hull.push_back(option);
  }
  return hull;
}

std::vector<Option> OptionsOf(const ShardHeader& header, const BlockView& place,
                              const Backend::BlockSpectrum& spectrum, double weight) {
  if (!spectrum.coded) {
    return {{PartBytes(header, place, spectrum.code, 0), 0, spectrum.code, 0}};
  }
  const uint32_t d = header.shape.head_dim;
  std::vector<Option> options = {
      {PartBytes(header, place, BlockCode::kRaw, 0), 0, BlockCode::kRaw, 0}};
  for (size_t i = 0; i < kPrices.size(); ++i) {
    const stages::RankChoice choice = ChoiceAt(place, spectrum, d, kPrices[i]);
    const double left =
        stages::EnergyLeft(choice, spectrum.lambda.data(), spectrum.energy) * weight;
    const size_t factor_bytes = stages::KvsFactorBytes(
        {choice.bits.data(), static_cast<size_t>(choice.rank)}, place.rows, d);
    for (const BlockCode code : RateCodes(header.profile)) {
      options.push_back({PartBytes(header, place, code, factor_bytes), left * DistortionOf(code),
                         code, static_cast<uint8_t>(i)});
    }
  }
  return Hull(std::move(options));
}

// A step of one block to its next option.
struct Step {
  double gain_per_byte = 0;
  uint32_t block = 0;
  uint32_t to = 0;
};

// Takes the best steps first while they fit; a block whose next step doesn't fit stays where it is.
std::vector<uint32_t> Spend(const std::vector<std::vector<Option>>& hulls, uint64_t bytes_left) {
  std::vector<Step> steps;
  for (uint32_t b = 0; b < hulls.size(); ++b) {
    for (uint32_t to = 1; to < hulls[b].size(); ++to) {
      const Option& from = hulls[b][to - 1];
      const Option& next = hulls[b][to];
      steps.push_back(
          {(from.cost - next.cost) / static_cast<double>(next.bytes - from.bytes), b, to});
    }
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.gain_per_byte > b.gain_per_byte; });
  std::vector<uint32_t> chosen(hulls.size(), 0);
  for (const Step& step : steps) {
    const uint64_t extra = hulls[step.block][step.to].bytes - hulls[step.block][step.to - 1].bytes;
    if (chosen[step.block] + 1 == step.to && extra <= bytes_left) {
      chosen[step.block] = step.to;
      bytes_left -= extra;
    }
  }
  return chosen;
}

}  // namespace

uint64_t ShardBytesAt(const TensorShape& shape, double bits_per_entry, bool keys_only) {
  const double entries = (keys_only ? 1 : 2) * static_cast<double>(shape.entries());
  const double bytes = bits_per_entry * entries / 8;
  return static_cast<uint64_t>(bytes / 4) * 4;
}

absl::StatusOr<std::vector<BlockPlan>> PlanForRate(const ShardHeader& header,
                                                   std::span<const BlockView> places,
                                                   std::span<const Backend::BlockSpectrum> spectra,
                                                   double bits_per_entry) {
  const Weights weights(header, places, spectra);
  std::vector<std::vector<Option>> hulls;
  uint64_t least = format::kHeaderBytes + format::WriteExtensions(header.extensions).size() +
                   places.size() * format::kIndexEntryBytes;
  for (size_t i = 0; i < places.size(); ++i) {
    hulls.push_back(OptionsOf(header, places[i], spectra[i], weights.Of(places[i])));
    least += hulls.back().front().bytes;
  }
  const uint64_t budget = ShardBytesAt(header.shape, bits_per_entry, header.keys_only);
  if (least > budget) {
    const double needed = 8 * static_cast<double>(least) / static_cast<double>(header.entries());
    return BadArgument("bits_per_entry", bits_per_entry,
                       StrCat("layer ", header.layer, " needs at least ", needed));
  }
  const std::vector<uint32_t> chosen = Spend(hulls, budget - least);
  std::vector<BlockPlan> plans(places.size());
  for (size_t i = 0; i < places.size(); ++i) {
    const Option& option = hulls[i][chosen[i]];
    plans[i].code = option.code;
    if (spectra[i].coded && option.code != BlockCode::kRaw) {
      plans[i].choice =
          ChoiceAt(places[i], spectra[i], header.shape.head_dim, kPrices[option.price]);
    }
  }
  return plans;
}

}  // namespace kvshrink
