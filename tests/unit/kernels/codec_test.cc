// Whole shards: quality on real KV, determinism, what is exact, reports.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "blocks.h"

namespace kvshrink {
namespace {

using testing::DecodeAll;
using testing::OptionsOf;
using testing::Tensor;

std::string Encode(const Backend& backend, const Tensor& k, const Tensor& v,
                   const EncodeOptions& options, ShardReport* report = nullptr) {
  absl::StatusOr<std::string> bytes = EncodeShard(backend, k.View(), v.View(), options, report);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return bytes.ok() ? *std::move(bytes) : std::string();
}

// Bounds are the measured values on these traces, plus 3%: a codec that got worse fails here.
TEST(Quality, RateAndErrorOnRealKeysAndValues) {
  struct Bound {
    Profile profile;
    double bits, k, v;
  };
  const Bound kSmol[] = {
      {Profile::kFp8, 8.03, 0.00073, 0.00073},        {Profile::kTq2, 2.30, 0.110, 0.117},
      {Profile::kEOptShrinkQ2, 2.61, 0.0582, 0.0908}, {Profile::kKvs2, 2.17, 0.0246, 0.146},
      {Profile::kKvs3, 3.17, 0.0075, 0.0442},         {Profile::kKvs4, 4.17, 0.00209, 0.0124},
      {Profile::kKvs2t, 2.07, 0.0190, 0.1131},        {Profile::kKvs3t, 3.07, 0.00483, 0.0288}};
  const auto backend = MakeCpuBackend(2);
  for (const Bound& bound : kSmol) {
    ShardReport total;
    for (const int layer : {0, 6, 12, 17, 23, 29}) {
      ShardReport report;
      Encode(*backend, testing::SmolLayer("k", layer), testing::SmolLayer("v", layer),
             OptionsOf(bound.profile), &report);
      total.k.Add(report.k);
      total.v.Add(report.v);
      total.encoded_bytes += report.encoded_bytes;
      total.k.entries += report.k.entries;
      total.v.entries += report.v.entries;
    }
    const std::string name(GetProfileInfo(bound.profile).name);
    EXPECT_LE(total.bits_per_entry(), bound.bits + 0.03)
        << name;  // the raw row is fp32 here: 0.03 bits more than in fp16
    EXPECT_LE(total.k.relative_error(), bound.k) << name;
    EXPECT_LE(total.v.relative_error(), bound.v) << name;
  }
}

TEST(Determinism, SameBytesOnEveryRunAndThreadCount) {
  const Tensor k = testing::QwenLayer("k", 8);
  const Tensor v = testing::QwenLayer("v", 8);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    const std::string one = Encode(*MakeCpuBackend(1), k, v, OptionsOf(profile.profile));
    for (const int threads : {1, 2, 3, 8}) {
      EXPECT_EQ(Encode(*MakeCpuBackend(threads), k, v, OptionsOf(profile.profile)), one)
          << profile.name << " " << threads;
    }
  }
}

TEST(Determinism, BlocksDontDependOnTheirNeighbours) {
  // Head 1 alone gives the bytes that it has in the shard of two heads.
  const TensorShape both{200, 2, 64};
  const Tensor k = testing::LowRankPlusNoise(both, 5, 0.1F, 1);
  const Tensor v = testing::Gaussian(both, 2);
  const TensorShape one{200, 1, 64};
  Tensor k1 = testing::Zeros(one);
  Tensor v1 = testing::Zeros(one);
  for (uint32_t t = 0; t < 200; ++t) {
    for (uint32_t c = 0; c < 64; ++c) {
      k1.at(t, 0, c) = k.values[k.View().layout.Offset(t, 1) + c];
      v1.at(t, 0, c) = v.values[v.View().layout.Offset(t, 1) + c];
    }
  }
  const auto backend = MakeCpuBackend(2);
  const std::string shard_of_both = Encode(*backend, k, v, OptionsOf(Profile::kKvs2));
  const std::string shard_of_one = Encode(*backend, k1, v1, OptionsOf(Profile::kKvs2));
  const auto a = Shard::Parse(shard_of_both);
  const auto b = Shard::Parse(shard_of_one);
  ASSERT_TRUE(a.ok() && b.ok());
  for (const Kind kind : {Kind::kKey, Kind::kValue}) {
    for (uint32_t i = 0; i < 2; ++i) {
      const BlockView& x = a->block(kind, 1, i);
      const BlockView& y = b->block(kind, 0, i);
      EXPECT_EQ(x.rank, y.rank);
      EXPECT_EQ(x.exponent, y.exponent);
      EXPECT_TRUE(std::ranges::equal(x.factors, y.factors));
      EXPECT_TRUE(std::ranges::equal(x.scales, y.scales));
      EXPECT_TRUE(std::ranges::equal(x.codes, y.codes));
    }
  }
}

TEST(Exactness, FirstTokensOfTheSequenceAreKept) {
  const TensorShape shape{140, 2, 64};
  const Tensor k = testing::Gaussian(shape, 5);
  const Tensor v = testing::Gaussian(shape, 6);
  const auto backend = MakeCpuBackend(1);
  struct Case {
    uint32_t raw_tokens, first_token, expected;
  };
  for (const Case& test : {Case{4, 0, 4}, Case{4, 1, 3}, Case{4, 4, 0}, Case{4, 100, 0},
                           Case{0, 0, 0}, Case{135, 0, 135}, Case{500, 0, 140}}) {
    EncodeOptions options = OptionsOf(Profile::kKvs2);
    options.raw_tokens = test.raw_tokens;
    options.first_token = test.first_token;
    const std::string bytes = Encode(*backend, k, v, options);
    const auto shard = Shard::Parse(bytes);
    ASSERT_TRUE(shard.ok()) << shard.status();
    EXPECT_EQ(shard->header().raw_rows, test.expected);
    const auto decoded = DecodeAll(*backend, bytes);
    ASSERT_TRUE(decoded.ok());
    const size_t exact = size_t{test.expected} * 2 * 64;
    EXPECT_TRUE(std::equal(k.values.begin(), k.values.begin() + static_cast<std::ptrdiff_t>(exact),
                           decoded->k.values.begin()));
    if (test.expected < 140) {
      EXPECT_FALSE(std::equal(k.values.begin(), k.values.end(), decoded->k.values.begin()));
    }
  }
}

TEST(Reports, EncodersErrorIsWhatADecoderMeasures) {
  const auto backend = MakeCpuBackend(2);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    const Tensor k = testing::QwenLayer("k", 22);
    const Tensor v = testing::QwenLayer("v", 22);
    ShardReport report;
    const std::string bytes = Encode(*backend, k, v, OptionsOf(profile.profile), &report);
    const auto shard = Shard::Parse(bytes);
    ASSERT_TRUE(shard.ok());
    const auto measured = MeasureShard(*backend, *shard, k.View(), v.View());
    ASSERT_TRUE(measured.ok());
    for (const auto& [told, seen] :
         {std::pair(&report.k, &measured->k), std::pair(&report.v, &measured->v)}) {
      EXPECT_EQ(told->bytes, seen->bytes);
      EXPECT_EQ(told->blocks, seen->blocks);
      EXPECT_EQ(told->raw_blocks, seen->raw_blocks);
      EXPECT_EQ(told->rank_histogram, seen->rank_histogram);
      EXPECT_NEAR(told->error_energy, seen->error_energy, 0.01 * seen->error_energy)
          << profile.name;
      EXPECT_NEAR(told->energy, seen->energy, 1e-9 * seen->energy);
      EXPECT_NEAR(told->max_block_relative_error, seen->max_block_relative_error,
                  0.01 * seen->max_block_relative_error);
    }
    EXPECT_EQ(report.encoded_bytes, bytes.size());
    EXPECT_EQ(report.k.bytes + report.v.bytes, bytes.size());
  }
}

// The codes that a profile's blocks have under tighter and tighter bounds.
TEST(Bound, TrellisProfilesClimbTheTrellisThenTheAlphabets) {
  const Tensor k = testing::SmolLayer("k", 12);
  const Tensor v = testing::SmolLayer("v", 12);
  const auto backend = MakeCpuBackend(2);
  using enum BlockCode;
  for (const auto& [profile, ladder] :
       {std::pair(Profile::kKvs2t, std::set<BlockCode>{kTrellis15, kTrellis20, kTrellis25,
                                                       kTrellis30, kLevels12, kLevels16, kRaw}),
        std::pair(Profile::kKvs3t,
                  std::set<BlockCode>{kTrellis25, kTrellis30, kLevels12, kLevels16, kRaw})}) {
    std::set<BlockCode> seen;
    for (const double bound : {0.3, 0.1, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01, 0.007, 0.004, 1e-9}) {
      EncodeOptions options = OptionsOf(profile);
      options.max_relative_error = bound;
      ShardReport report;
      const std::string bytes = Encode(*backend, k, v, options, &report);
      EXPECT_LE(report.v.max_block_relative_error, bound);
      const auto shard = Shard::Parse(bytes);
      ASSERT_TRUE(shard.ok()) << shard.status();
      for (const BlockView& block : shard->blocks()) {
        seen.insert(block.code);
      }
    }
    EXPECT_EQ(seen, ladder) << GetProfileInfo(profile).name;
  }
}

TEST(Bound, BlocksOverItGetMoreBitsThenAreRaw) {
  const Tensor k = testing::SmolLayer("k", 12);
  const Tensor v = testing::SmolLayer("v", 12);
  const auto backend = MakeCpuBackend(2);
  double last_bits = 0;
  for (const double bound : {0.3, 0.1, 0.03, 0.01, 0.001, 1e-9}) {
    EncodeOptions options = OptionsOf(Profile::kKvs2);
    options.max_relative_error = bound;
    ShardReport report;
    const std::string bytes = Encode(*backend, k, v, options, &report);
    EXPECT_LE(report.k.max_block_relative_error, bound);
    EXPECT_LE(report.v.max_block_relative_error, bound);
    EXPECT_GE(report.bits_per_entry(), last_bits);
    last_bits = report.bits_per_entry();
    if (bound == 0.03) {
      EXPECT_GT(report.v.escalated_blocks, 0U);
      EXPECT_EQ(report.v.raw_blocks, 0U);
    }
    if (bound == 1e-9) {
      EXPECT_EQ(report.k.raw_blocks, report.k.blocks);
      const auto decoded = DecodeAll(*backend, bytes);
      ASSERT_TRUE(decoded.ok());
      EXPECT_EQ(decoded->k.values, k.values);
      EXPECT_EQ(decoded->v.values, v.values);
    }
  }
}

TEST(Preview, IsAPrefixThatHoldsTheLowRankPart) {
  const Tensor k = testing::QwenLayer("k", 4);
  const Tensor v = testing::QwenLayer("v", 4);
  const auto backend = MakeCpuBackend(1);
  const std::string bytes = Encode(*backend, k, v, OptionsOf(Profile::kKvs2));
  const auto shard = Shard::Parse(bytes);
  ASSERT_TRUE(shard.ok());
  const std::string preview = bytes.substr(0, shard->preview_bytes());
  EXPECT_LT(preview.size(), bytes.size() / 3);
  const auto full = DecodeAll(*backend, bytes, DecodeForm::kLowRank);
  const auto cut = DecodeAll(*backend, preview, DecodeForm::kLowRank);
  ASSERT_TRUE(full.ok() && cut.ok()) << cut.status();
  EXPECT_EQ(full->k.values, cut->k.values);
  EXPECT_EQ(full->v.values, cut->v.values);
  // Qwen's keys have a large common component: nearly all of them is in the preview.
  EXPECT_LT(testing::ErrorEnergy(k.values, cut->k.values), 0.05 * testing::Energy(k.values));
  EXPECT_FALSE(DecodeAll(*backend, preview, DecodeForm::kFull).ok());
}

TEST(Arguments, ErrorsNameTheField) {
  const auto backend = MakeCpuBackend(1);
  const Tensor good = testing::Gaussian({10, 1, 64}, 1);
  const auto message = [&](ConstTensor k, ConstTensor v, EncodeOptions options) {
    const auto bytes = EncodeShard(*backend, k, v, options);
    EXPECT_EQ(bytes.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(bytes.status().message());
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  ConstTensor bad = good.View();
  bad.shape.head_dim = 0;
  EXPECT_TRUE(contains(message(bad, good.View(), {}), "'head_dim' is 0"));
  bad = good.View();
  bad.shape.tokens = 70000;
  EXPECT_TRUE(contains(message(good.View(), bad, {}), "'tokens' is 70000"));
  bad = good.View();
  bad.dtype = DType::kBf16;
  EXPECT_TRUE(contains(message(good.View(), bad, {}), "'v.dtype' is bf16"));
  bad = good.View();
  bad.shape.tokens = 9;
  EXPECT_TRUE(contains(message(good.View(), bad, {}), "'v.shape'"));
  bad = good.View();
  bad.data = nullptr;
  EXPECT_TRUE(contains(message(bad, good.View(), {}), "'k.data'"));
  EncodeOptions options;
  options.layer = 5000;
  EXPECT_TRUE(contains(message(good.View(), good.View(), options), "'layer' is 5000"));
  options = {};
  options.max_relative_error = NAN;
  EXPECT_TRUE(contains(message(good.View(), good.View(), options), "'max_relative_error'"));
  options = {};
  options.first_token = 0x7FFFFFFF;
  EXPECT_TRUE(contains(message(good.View(), good.View(), options), "'first_token'"));
}

}  // namespace
}  // namespace kvshrink
