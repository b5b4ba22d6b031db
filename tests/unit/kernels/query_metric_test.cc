// Profile kvs2c: K coded in the metric of a calibrated basis.
#include <gtest/gtest.h>

#include <cmath>

#include "bases.h"
#include "format/layout.h"
#include "kvshrink/attention.h"
#include "kvshrink/strcat.h"

namespace kvshrink {
namespace {

using testing::MakeBasis;
using testing::OptionsOf;
using testing::RandomBasis;
using testing::Tensor;

Rope Embedding(uint32_t rotary_dim) {
  Rope rope;
  rope.theta = 1e5;
  rope.rotary_dim = rotary_dim;
  return rope;
}

// A basis and the options that take it, with and without an embedding.
struct Setting {
  Basis basis;
  EncodeOptions options;

  explicit Setting(const TensorShape& shape, std::optional<Rope> rope = std::nullopt)
      : basis(MakeBasis(RandomBasis(shape.head_dim, shape.kv_heads, {0}, rope))),
        options(OptionsOf(Profile::kKvs2c)) {
    options.rope = rope;
    options.basis = &basis;
  }
};

std::vector<std::optional<Rope>> Ropes(const TensorShape& shape) {
  return {std::nullopt, Embedding(shape.head_dim)};
}

testing::Decoded Decode(const Backend& backend, const std::string& bytes, const Basis& basis,
                        DecodeForm form = DecodeForm::kFull) {
  const Shard shard = *Shard::Parse(bytes, Extent::kAllowPreview);
  testing::Decoded decoded{testing::Zeros(shard.header().shape),
                           testing::Zeros(shard.header().shape)};
  const absl::Status status =
      DecodeShard(backend, shard, form, decoded.k.MutableView(), decoded.v.MutableView(), &basis);
  EXPECT_TRUE(status.ok()) << status;
  return decoded;
}

// Sum over tokens of the squared error in a metric, of one head.
double WeightedError(const Basis& basis, uint32_t head, const Tensor& a, const Tensor& b) {
  const uint32_t d = a.shape.head_dim;
  const float* weight = basis.metric(0, head).weight;
  double sum = 0;
  for (uint32_t t = 0; t < a.shape.tokens; ++t) {
    const size_t row = a.View().layout.Offset(t, head);
    for (uint32_t i = 0; i < d; ++i) {
      double value = 0;
      for (uint32_t c = 0; c < d; ++c) {
        value += static_cast<double>(weight[size_t{i} * d + c]) *
                 (static_cast<double>(a.values[row + c]) - static_cast<double>(b.values[row + c]));
      }
      sum += value * value;
    }
  }
  return sum;
}

TEST(QueryMetric, ErrorFallsWhereQueriesDontLook) {
  const auto backend = MakeCpuBackend(2);
  const Tensor k = testing::SmolLayer("k", 17);
  const Tensor v = testing::SmolLayer("v", 17);
  const Setting setting(k.shape);
  ShardReport report;
  const auto calibrated = EncodeShard(*backend, k.View(), v.View(), setting.options, &report);
  ShardReport plain_report;
  const auto plain =
      EncodeShard(*backend, k.View(), v.View(), OptionsOf(Profile::kKvs2), &plain_report);
  ASSERT_TRUE(calibrated.ok() && plain.ok()) << calibrated.status();
  const auto a = Decode(*backend, *calibrated, setting.basis);
  const auto b = Decode(*backend, *plain, setting.basis);
  for (uint32_t head = 0; head < k.shape.kv_heads; ++head) {
    EXPECT_LT(WeightedError(setting.basis, head, a.k, k),
              0.85 * WeightedError(setting.basis, head, b.k, k))
        << head;
  }
  EXPECT_NEAR(report.bits_per_entry(), plain_report.bits_per_entry(), 0.15);
  EXPECT_EQ(a.v.values, b.v.values);
  EXPECT_EQ(Shard::Parse(*calibrated)->header().extensions.basis, setting.basis.id());
}

TEST(QueryMetric, ReportsAreWhatADecoderMeasures) {
  for (const auto& backend : {MakeCpuBackend(2), MakeReferenceBackend()}) {
    const Tensor k = testing::QwenLayer("k", 8);
    for (const auto& rope : Ropes(k.shape)) {
      Setting setting(k.shape, rope);
      for (const double bound : {0.0, 0.002, 1e-9}) {
        setting.options.max_relative_error = bound;
        ShardReport report;
        const auto bytes = EncodeShard(*backend, k.View(), k.View(), setting.options, &report);
        ASSERT_TRUE(bytes.ok()) << bytes.status();
        const auto measured =
            MeasureShard(*backend, *Shard::Parse(*bytes), k.View(), k.View(), &setting.basis);
        ASSERT_TRUE(measured.ok()) << measured.status();
        EXPECT_NEAR(measured->k.error_energy, report.k.error_energy, 0.01 * report.k.error_energy);
        EXPECT_NEAR(measured->k.energy, report.k.energy, 1e-6 * report.k.energy);
        EXPECT_EQ(measured->k.raw_blocks, report.k.raw_blocks);
        if (bound > 0) {
          EXPECT_LE(measured->k.max_block_relative_error, bound * 1.01) << backend->name();
          EXPECT_EQ(report.k.raw_blocks == report.k.blocks, bound < 1e-6);
          EXPECT_EQ(report.k.escalated_blocks > 0, bound > 1e-6);
        }
      }
    }
  }
}

TEST(QueryMetric, BackendsAgreeAndThreadsDontMatter) {
  const auto cpu = MakeCpuBackend(1);
  const auto reference = MakeReferenceBackend();
  const Tensor k = testing::SmolLayer("k", 0);
  for (const auto& rope : Ropes(k.shape)) {
    const Setting setting(k.shape, rope);
    ShardReport a;
    ShardReport b;
    const auto bytes = EncodeShard(*cpu, k.View(), k.View(), setting.options, &a);
    ASSERT_TRUE(bytes.ok());
    ASSERT_TRUE(EncodeShard(*reference, k.View(), k.View(), setting.options, &b).ok());
    EXPECT_NEAR(a.bits_per_entry(), b.bits_per_entry(), 0.005 * b.bits_per_entry());
    EXPECT_NEAR(a.k.relative_error(), b.k.relative_error(), 0.005 * b.k.relative_error());
    for (const int threads : {2, 5}) {
      EXPECT_EQ(*EncodeShard(*MakeCpuBackend(threads), k.View(), k.View(), setting.options),
                *bytes);
    }
    for (const DecodeForm form : {DecodeForm::kFull, DecodeForm::kLowRank}) {
      const auto x = Decode(*cpu, *bytes, setting.basis, form);
      const auto y = Decode(*reference, *bytes, setting.basis, form);
      EXPECT_LT(testing::ErrorEnergy(x.k.values, y.k.values), 1e-10 * testing::Energy(y.k.values));
    }
  }
}

TEST(QueryMetric, RawRowsAndBlocksAreExact) {
  const auto backend = MakeCpuBackend(2);
  Tensor k = testing::Gaussian({300, 2, 48}, 5);
  const Tensor v = testing::Gaussian({300, 2, 48}, 6);
  k.at(200, 0, 9) = INFINITY;
  k.at(290, 0, 9) = 3e38F;  // its weighted row may be beyond the largest float
  for (const auto& rope : Ropes(k.shape)) {
    Setting setting(k.shape, rope);
    setting.options.raw_tokens = 7;
    for (const double bound : {0.0, 0.01}) {
      setting.options.max_relative_error = bound;
      const auto bytes = EncodeShard(*backend, k.View(), v.View(), setting.options);
      ASSERT_TRUE(bytes.ok());
      Tensor after = Decode(*backend, *bytes, setting.basis).k;
      for (uint32_t t = 0; t < 300; ++t) {
        for (uint32_t c = 0; c < 48; ++c) {
          if (t < 7 || t / 128 == 1) {
            ASSERT_EQ(after.at(t, 0, c), k.at(t, 0, c)) << t;
          }
          ASSERT_TRUE(std::isfinite(after.at(t, 1, c)));
        }
      }
    }
  }
}

TEST(QueryMetric, PlansOfARateHold) {
  const auto backend = MakeCpuBackend(2);
  const Tensor k = testing::SmolLayer("k", 17);
  Setting setting(k.shape);
  setting.options.bits_per_entry = 2.5;
  ShardReport report;
  const auto bytes = EncodeShard(*backend, k.View(), k.View(), setting.options, &report);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_LE(report.bits_per_entry(), 2.5);
  EXPECT_GT(report.bits_per_entry(), 2.3);
  const auto measured =
      MeasureShard(*backend, *Shard::Parse(*bytes), k.View(), k.View(), &setting.basis);
  EXPECT_NEAR(measured->k.error_energy, report.k.error_energy, 0.01 * report.k.error_energy);
}

TEST(QueryMetric, AttentionOnTheCompressedForm) {
  const TensorShape shape{300, 2, 64};
  Tensor k = testing::LowRankPlusNoise(shape, 3, 0.3F, 1);
  const Tensor v = testing::Gaussian(shape, 2);
  const AttentionParams params{3, 4, 0, 0, 260, 100};
  const std::vector<float> q = testing::Gaussian({3, 4, 64}, 3).values;
  for (const auto& backend : {MakeCpuBackend(2), MakeReferenceBackend()}) {
    for (const auto& rope : Ropes(shape)) {
      const Setting setting(shape, rope);
      for (const bool raw_block : {false, true}) {
        k.at(290, 0, 1) = raw_block ? INFINITY : 1;  // not seen
        const auto bytes = EncodeShard(*backend, k.View(), v.View(), setting.options);
        ASSERT_TRUE(bytes.ok());
        const Shard shard = *Shard::Parse(*bytes);
        const auto decoded = Decode(*backend, *bytes, setting.basis);
        // The same over the decoded tensors, kept as they are.
        const auto exact =
            EncodeShard(*backend, decoded.k.View(), decoded.v.View(), OptionsOf(Profile::kRaw));
        const Shard raw = *Shard::Parse(*exact);
        std::vector<float> logits(3 * 4 * 300);
        std::vector<float> expected(logits.size());
        ASSERT_TRUE(
            AttentionScores(*backend, shard, params, q.data(), logits.data(), &setting.basis).ok());
        ASSERT_TRUE(AttentionScores(*backend, raw, params, q.data(), expected.data()).ok());
        for (size_t i = 0; i < logits.size(); ++i) {
          if (std::isfinite(expected[i])) {
            ASSERT_NEAR(logits[i], expected[i], 2e-4) << i;
          } else {
            ASSERT_FALSE(std::isfinite(logits[i]));
          }
        }
        if (raw_block) {
          continue;  // an infinity that isn't seen is still multiplied by a weight of 0
        }
        AttentionAccumulator a(params, 64);
        AttentionAccumulator b(params, 64);
        ASSERT_TRUE(a.Add(*backend, shard, q.data(), &setting.basis).ok());
        ASSERT_TRUE(b.Add(*backend, raw, q.data()).ok());
        for (size_t i = 0; i < a.output().size(); ++i) {
          ASSERT_NEAR(a.output()[i], b.output()[i], 2e-4);
        }
      }
    }
  }
}

TEST(QueryMetric, MissingAndOtherBasesAreRefused) {
  const auto backend = MakeCpuBackend(1);
  const Tensor k = testing::Gaussian({20, 2, 16}, 1);
  Setting setting(k.shape);
  const auto expect = [](const absl::Status& status, absl::StatusCode code,
                         const std::string& message) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_NE(std::string(status.message()).find(message), std::string::npos) << status;
  };
  const std::string bytes = *EncodeShard(*backend, k.View(), k.View(), setting.options);
  const Shard shard = *Shard::Parse(bytes);
  const Basis other = MakeBasis(RandomBasis(16, 2, {0}, std::nullopt, 8));
  const std::string id = BasisIdText(setting.basis.id());
  Tensor out = k;
  const AttentionParams params{1, 2, 0, 0, -1, 0};
  std::vector<float> logits(40);
  for (const Basis* basis : {static_cast<const Basis*>(nullptr), &other}) {
    const std::string message =
        StrCat("'basis' is ", basis == nullptr ? "none" : BasisIdText(other.id()),
               ": the shard was coded with basis ", id);
    const auto code = absl::StatusCode::kFailedPrecondition;
    expect(DecodeShard(*backend, shard, DecodeForm::kFull, out.MutableView(), out.MutableView(),
                       basis),
           code, message);
    expect(MeasureShard(*backend, shard, k.View(), k.View(), basis).status(), code, message);
    expect(AttentionScores(*backend, shard, params, k.values.data(), logits.data(), basis), code,
           message);
    AttentionAccumulator accumulator(params, 16);
    expect(accumulator.Add(*backend, shard, k.values.data(), basis), code, message);
  }
  const auto encode = [&](const EncodeOptions& options) {
    return EncodeShard(*backend, k.View(), k.View(), options).status();
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EncodeOptions options = setting.options;
  options.layer = 1;
  expect(encode(options), invalid, "'basis.layers'");
  options = setting.options;
  options.rope = Embedding(16);
  expect(encode(options), invalid, "'basis.rope' is none: layer 0 is coded with theta=");
  options.basis = nullptr;
  expect(encode(options), invalid, "'basis' is none: profile kvs2c needs");
  // Of a peer's making: the id fits and the shape doesn't.
  const Tensor wide = testing::Gaussian({20, 1, 32}, 1);
  const Setting wider(wide.shape);
  std::string forged = *EncodeShard(*backend, wide.View(), wide.View(), wider.options);
  const Shard forged_shard = *Shard::Parse(forged);
  ShardHeader header = forged_shard.header();
  header.extensions.basis = setting.basis.id();
  expect(CheckBasisOf(header, &setting.basis), invalid, "'basis.head_dim' is 16");
}

// The extension belongs to the profile.
TEST(QueryMetric, ShardsOfTheProfileNameTheirBasis) {
  const auto backend = MakeCpuBackend(1);
  const Tensor k = testing::Gaussian({20, 1, 16}, 1);
  const Setting setting(k.shape);
  const std::string good = *EncodeShard(*backend, k.View(), k.View(), setting.options);
  const auto with_profile = [](std::string bytes, Profile profile) {
    bytes[format::offset::kProfile] = static_cast<char>(profile);
    auto* data = reinterpret_cast<uint8_t*>(bytes.data());
    format::StoreLittle(format::HeaderChecksum(data, format::offset::kHeaderChecksum),
                        data + format::offset::kHeaderChecksum);
    return Shard::Parse(bytes).status();
  };
  EXPECT_TRUE(with_profile(good, Profile::kKvs2c).ok());
  absl::Status status = with_profile(good, Profile::kKvs2);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(std::string(status.message()).find("'extension.basis'"), std::string::npos) << status;
  status = with_profile(*EncodeShard(*backend, k.View(), k.View(), OptionsOf(Profile::kKvs2)),
                        Profile::kKvs2c);
  EXPECT_NE(std::string(status.message()).find("'extension.basis' is none"), std::string::npos)
      << status;
}

}  // namespace
}  // namespace kvshrink
