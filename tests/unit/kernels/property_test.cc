// Laws that hold for every block, however hostile: tried on many blocks from seeds.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "block_pipeline.h"
#include "hostile_blocks.h"
#include "kvshrink/strcat.h"
#include "stages/digits.h"
#include "stages/exponent.h"
#include "stages/trellis.h"

namespace kvshrink {
namespace {

using testing::DecodeAll;
using testing::Hostile;
using testing::HostileMaker;
using testing::OptionsOf;
using testing::Tensor;

constexpr uint32_t kSeeds = 24;

struct Pair {
  Tensor k, v;
};

Pair MakePair(uint32_t seed) {
  HostileMaker maker(seed);
  const TensorShape shape = maker.Shape();
  Tensor k = maker.Make(shape);
  return {std::move(k), maker.Make(shape)};
}

EncodeOptions Coded(Profile profile) {
  EncodeOptions options = OptionsOf(profile);
  options.raw_tokens = 0;
  return options;
}

std::string Encode(const Backend& backend, const Pair& pair, const EncodeOptions& options,
                   ShardReport* report = nullptr) {
  auto bytes = EncodeShard(backend, pair.k.View(), pair.v.View(), options, report);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return *std::move(bytes);
}

// What a decoder gets of a block, all but its exponent.
std::string Record(const BlockView& block) {
  std::string record = {static_cast<char>(block.code), static_cast<char>(block.rank)};
  for (const auto part : {block.raw, block.factors, block.scales, block.codes}) {
    record.append(part.begin(), part.end());
    record.push_back('|');
  }
  return record;
}

std::vector<std::string> Records(const std::string& bytes) {
  const auto shard = Shard::Parse(bytes);
  EXPECT_TRUE(shard.ok()) << shard.status();
  std::vector<std::string> records;
  for (const BlockView& block : shard->blocks()) {
    records.push_back(StrCat(block.exponent, " ") + Record(block));
  }
  return records;
}

// What a trellis may lose: were the coded bits thrown at random and the lowest member taken, every
// window would be as likely as any other, and the expected error of a row x that of |x|^2 + |c|^2 -
// 2 <x, c>, with the table's means for c. The best bits do no worse. Rows of kvs: see below.
double MostOfTrellis(const stages::TrellisCode& code) {
  const int windows = code.windows();
  double energy = 0;
  double mean[2] = {};
  for (int window = 0; window < windows; ++window) {
    double lowest = INFINITY;
    double value[2] = {};
    for (int member = 0; member < code.members(); ++member) {
      const int8_t* entry = code.table + (member * windows + window) * code.values;
      const double a = double{stages::kTrellisUnit} * entry[0];
      const double b = code.values == 2 ? double{stages::kTrellisUnit} * entry[1] : 0;
      if (a * a + b * b < lowest) {
        lowest = a * a + b * b;
        value[0] = a;
        value[1] = b;
      }
    }
    energy += lowest / windows / code.values;
    mean[0] += value[0] / windows;
    mean[1] += value[1] / windows;
  }
  const double offset = std::max(std::abs(mean[0]), std::abs(mean[1]));
  return 1.01 * (1 + 2 * energy + 2 * std::sqrt(2.0) * offset);
}

// The most that a block may lose, as a share of its energy, whatever is in it. Blocks kept raw lose
// nothing. fp8: half a unit in the last of 4 significant bits, squared, and what is below e4m3's
// normal range. Level codes: a value between the lowest levels (0 included where the alphabet has
// it) is at most L_min^2 g^2 off, any other value is off by no more than itself; g is a row's rms
// (tq), or up to half a step of an octave above it (kvs). eoptshrinkq codes its factors after the
// residual is taken, so that their error comes on top.
double MostRelativeError(const ProfileInfo& profile) {
  if (profile.family == Family::kRaw) {
    return 0;
  }
  if (profile.family == Family::kFp8) {
    return 0x1p-8 * 1.01;
  }
  const stages::TrellisCode* trellis = stages::TrellisOf(profile.code);
  if (trellis != nullptr) {
    return MostOfTrellis(*trellis);
  }
  const stages::Codebook& codebook = *stages::CodebookOf(profile.code);
  const auto lowest = static_cast<double>(codebook.level[codebook.levels / 2]);
  const double scale = profile.family == Family::kKvs ? 2 : 1;
  const double rounding = 1.01;
  return rounding * (1 + scale * lowest * lowest) *
         (profile.family == Family::kEOptShrinkQ ? 1.25 : 1);
}

TEST(Property, NoBlockLosesMoreThanTheBoundOfItsProfile) {
  const auto backend = MakeCpuBackend(2);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    double worst = 0;
    for (uint32_t seed = 0; seed < kSeeds; ++seed) {
      const Pair pair = MakePair(seed);
      ShardReport report;
      Encode(*backend, pair, OptionsOf(profile.profile), &report);
      for (const KindReport& kind : {report.k, report.v}) {
        worst = std::max(worst, kind.max_block_relative_error);
      }
    }
    EXPECT_LE(worst, MostRelativeError(profile)) << profile.name;
  }
}

// All but rows made against the rotation lose little more than noise does: the quantiser's
// distortion, times what rows of a few large channels cost it.
TEST(Property, HostileBlocksLoseLittleMoreThanNoise) {
  const auto backend = MakeCpuBackend(2);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    const double most = profile.family == Family::kRaw   ? 0
                        : profile.family == Family::kFp8 ? 0.0011
                                                         : 1.8 * DistortionOf(profile.code);
    for (size_t kind = 0; kind < testing::kHostileKinds; ++kind) {
      if (static_cast<Hostile>(kind) == Hostile::kAgainstRotation) {
        continue;
      }
      for (const uint32_t head_dim : {64U, 80U, 128U, 192U}) {
        HostileMaker maker(static_cast<uint32_t>(kind) + head_dim);
        const Tensor k = maker.Make({128, 4, head_dim}, static_cast<Hostile>(kind));
        ShardReport report;
        Encode(*backend, {k, k}, OptionsOf(profile.profile), &report);
        EXPECT_LE(report.k.max_block_relative_error, most)
            << profile.name << " kind " << kind << " head_dim " << head_dim;
        EXPECT_LE(report.v.max_block_relative_error, most)
            << profile.name << " kind " << kind << " head_dim " << head_dim;
      }
    }
  }
}

TEST(Property, AReportSaysWhatADecoderMeasures) {
  const auto backend = MakeCpuBackend(2);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    for (uint32_t seed = 0; seed < kSeeds; ++seed) {
      const Pair pair = MakePair(seed);
      ShardReport report;
      const std::string bytes = Encode(*backend, pair, OptionsOf(profile.profile), &report);
      const auto measured =
          MeasureShard(*backend, *Shard::Parse(bytes), pair.k.View(), pair.v.View());
      ASSERT_TRUE(measured.ok()) << measured.status();
      // An error near fp32's own rounding isn't measured to a percent.
      const double floor = 1e-11;
      EXPECT_NEAR(report.k.relative_error(), measured->k.relative_error(),
                  0.01 * measured->k.relative_error() + floor)
          << profile.name << " seed " << seed;
      EXPECT_NEAR(report.v.relative_error(), measured->v.relative_error(),
                  0.01 * measured->v.relative_error() + floor)
          << profile.name << " seed " << seed;
      EXPECT_EQ(report.k.bytes + report.v.bytes, bytes.size());
      EXPECT_EQ(report.k.raw_blocks, measured->k.raw_blocks);
    }
  }
}

// Scaled by a power of two, a block changes its exponent and nothing else, and its decode by that
// power.
TEST(Property, APowerOfTwoMovesTheExponentAlone) {
  const auto backend = MakeCpuBackend(2);
  for (const Hostile kind : {Hostile::kGaussian, Hostile::kOutlierChannels, Hostile::kBiased,
                             Hostile::kMassiveFirstTokens, Hostile::kSparse, Hostile::kUnevenRows,
                             Hostile::kAgainstRotation, Hostile::kConstant}) {
    HostileMaker maker(static_cast<uint32_t>(kind) + 100);
    const TensorShape shape{130, 1, 96};
    const Tensor k = maker.Make(shape, kind);
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      const std::string plain = Encode(*backend, {k, k}, Coded(profile.profile));
      const auto decoded = DecodeAll(*backend, plain);
      const auto shard = *Shard::Parse(plain);
      ASSERT_TRUE(decoded.ok());
      for (const int exponent : {-60, -1, 7, 70}) {
        Tensor scaled = k;
        for (float& value : scaled.values) {
          value = std::ldexp(value, exponent);
        }
        const std::string bytes = Encode(*backend, {scaled, scaled}, Coded(profile.profile));
        const auto scaled_shard = *Shard::Parse(bytes);
        const auto scaled_decoded = DecodeAll(*backend, bytes);
        ASSERT_TRUE(scaled_decoded.ok());
        for (size_t i = 0; i < decoded->k.values.size(); ++i) {
          ASSERT_EQ(scaled_decoded->k.values[i], std::ldexp(decoded->k.values[i], exponent))
              << profile.name << " kind " << int{static_cast<uint8_t>(kind)};
        }
        for (const BlockView& block : shard.blocks()) {
          const BlockView& other = scaled_shard.blocks()[block.index];
          if (block.code == BlockCode::kRaw || block.code == BlockCode::kZero) {
            EXPECT_EQ(other.code, block.code);
            continue;
          }
          ASSERT_EQ(Record(other), Record(block)) << profile.name;
          EXPECT_EQ(other.exponent, block.exponent + exponent);
        }
      }
    }
  }
}

TEST(Property, BlocksMoveWithTheirHeads) {
  const auto backend = MakeCpuBackend(2);
  for (uint32_t seed = 0; seed < kSeeds / 2; ++seed) {
    const Pair pair = MakePair(seed);
    const TensorShape& shape = pair.k.shape;
    std::vector<uint32_t> order(shape.kv_heads);
    std::iota(order.begin(), order.end(), 0U);
    std::rotate(order.begin(), order.begin() + 1, order.end());
    Pair moved{testing::Zeros(shape), testing::Zeros(shape)};
    for (uint32_t t = 0; t < shape.tokens; ++t) {
      for (uint32_t head = 0; head < shape.kv_heads; ++head) {
        for (uint32_t c = 0; c < shape.head_dim; ++c) {
          moved.k.at(t, head, c) =
              pair.k.values[(t * shape.kv_heads + order[head]) * shape.head_dim + c];
          moved.v.at(t, head, c) =
              pair.v.values[(t * shape.kv_heads + order[head]) * shape.head_dim + c];
        }
      }
    }
    const uint32_t per_head = (shape.tokens + kBlockTokens - 1) / kBlockTokens;
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      const auto before = Records(Encode(*backend, pair, OptionsOf(profile.profile)));
      const auto after = Records(Encode(*backend, moved, OptionsOf(profile.profile)));
      for (uint32_t i = 0; i < after.size(); ++i) {
        const uint32_t kind_head = i / per_head;
        const uint32_t source =
            (kind_head / shape.kv_heads * shape.kv_heads + order[kind_head % shape.kv_heads]) *
                per_head +
            i % per_head;
        ASSERT_EQ(after[i], before[source]) << profile.name << " seed " << seed;
      }
    }
  }
}

// kvs alone has other prices for V.
TEST(Property, KeysAndValuesAreCodedAlikeButInKvs) {
  const auto backend = MakeCpuBackend(2);
  for (uint32_t seed = 0; seed < kSeeds / 2; ++seed) {
    const Pair pair = MakePair(seed);
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      if (profile.family == Family::kKvs) {
        continue;
      }
      auto records = Records(Encode(*backend, pair, OptionsOf(profile.profile)));
      const auto swapped = Records(Encode(*backend, {pair.v, pair.k}, OptionsOf(profile.profile)));
      std::rotate(records.begin(),
                  records.begin() + static_cast<std::ptrdiff_t>(records.size() / 2), records.end());
      ASSERT_EQ(swapped, records) << profile.name << " seed " << seed;
    }
  }
}

// The second block of a longer chunk, and of a chunk elsewhere in the sequence, is coded as the
// same rows are alone.
TEST(Property, ABlockKnowsNothingOfItsPlaceAndNeighbours) {
  const auto backend = MakeCpuBackend(2);
  for (uint32_t seed = 0; seed < kSeeds / 2; ++seed) {
    HostileMaker maker(seed + 500);
    TensorShape shape = maker.Shape();
    const Pair alone{maker.Make(shape), maker.Make(shape)};
    const auto behind = [&](const Tensor& tensor) {
      TensorShape longer = shape;
      longer.tokens += kBlockTokens;
      Tensor result = maker.Make({kBlockTokens, shape.kv_heads, shape.head_dim});
      result.shape = longer;
      result.values.insert(result.values.end(), tensor.values.begin(), tensor.values.end());
      return result;
    };
    const Pair second{behind(alone.k), behind(alone.v)};
    const uint32_t blocks = (shape.tokens + kBlockTokens - 1) / kBlockTokens;
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      EncodeOptions options = Coded(profile.profile);
      const auto expected = Records(Encode(*backend, alone, options));
      options.first_token = 12345;
      const auto found = Records(Encode(*backend, second, options));
      for (uint32_t i = 0; i < expected.size(); ++i) {
        ASSERT_EQ(found[i / blocks * (blocks + 1) + 1 + i % blocks], expected[i])
            << profile.name << " seed " << seed;
      }
    }
  }
}

TEST(Property, AnyNumberOfThreadsGivesTheSameShard) {
  const auto one = MakeCpuBackend(1);
  const auto many = MakeCpuBackend(5);
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const Pair pair = MakePair(seed);
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      EncodeOptions options = OptionsOf(profile.profile);
      options.max_relative_error = seed % 3 == 0 ? 0.03 : 0;
      ASSERT_EQ(Encode(*one, pair, options), Encode(*many, pair, options))
          << profile.name << " seed " << seed;
    }
  }
}

// Under a bound, no block is above it: more bits, then raw and exact.
TEST(Property, NoBlockIsAboveTheCallersBound) {
  const auto backend = MakeCpuBackend(2);
  for (uint32_t seed = 0; seed < kSeeds; ++seed) {
    const Pair pair = MakePair(seed);
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      for (const double bound : {0.1, 0.003}) {
        EncodeOptions options = OptionsOf(profile.profile);
        options.max_relative_error = bound;
        const std::string bytes = Encode(*backend, pair, options);
        const auto measured =
            MeasureShard(*backend, *Shard::Parse(bytes), pair.k.View(), pair.v.View());
        ASSERT_TRUE(measured.ok());
        for (const KindReport& kind : {measured->k, measured->v}) {
          EXPECT_LE(kind.max_block_relative_error, bound * 1.001)
              << profile.name << " seed " << seed;
        }
      }
    }
  }
}

// bf16 sources: what is finite decodes finite in every dtype, and raw rows come back bit by bit.
TEST(Property, Bf16ExtremesStayFinite) {
  const auto backend = MakeCpuBackend(2);
  for (uint32_t seed = 0; seed < kSeeds / 2; ++seed) {
    HostileMaker maker(seed + 900);
    const TensorShape shape = maker.Shape();
    const Tensor tensor = maker.Make(shape);
    const std::vector<std::byte> bytes = testing::Bf16Bytes(tensor);
    const ConstTensor source{bytes.data(), DType::kBf16, shape, LayoutThd(shape)};
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      const auto encoded = EncodeShard(*backend, source, source, OptionsOf(profile.profile));
      ASSERT_TRUE(encoded.ok()) << encoded.status();
      for (const DType dtype : {DType::kFp32, DType::kFp16, DType::kBf16, DType::kFp8E4m3}) {
        std::vector<std::byte> k(shape.entries() * DTypeBytes(dtype));
        std::vector<std::byte> v(k.size());
        ASSERT_TRUE(DecodeShard(*backend, *Shard::Parse(*encoded), DecodeForm::kFull,
                                {k.data(), dtype, shape, LayoutThd(shape)},
                                MutableTensor{v.data(), dtype, shape, LayoutThd(shape)})
                        .ok());
        std::vector<float> values(shape.entries());
        ToFloats(k.data(), dtype, values.size(), values.data());
        EXPECT_TRUE(
            std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); }))
            << profile.name << " seed " << seed;
        if (dtype == DType::kBf16) {
          EXPECT_EQ(
              std::memcmp(k.data(), bytes.data(), size_t{shape.kv_heads} * shape.head_dim * 2), 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvshrink
