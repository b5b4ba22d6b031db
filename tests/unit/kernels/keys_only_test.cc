// Shards without V: the latents of MLA (one head of 512 channels) and their shared rotary part.
#include <gtest/gtest.h>

#include <cmath>

#include "blocks.h"
#include "format/layout.h"
#include "kvshrink/attention.h"

namespace kvshrink {
namespace {

using testing::OptionsOf;
using testing::Tensor;

constexpr TensorShape kLatent{300, 1, 512};
constexpr TensorShape kRotary{300, 1, 64};

Tensor Keys(TensorShape shape) { return testing::LowRankPlusNoise(shape, 8, 0.05F, 71); }

std::string EncodeKeys(const Tensor& k, Profile profile, ShardReport* report = nullptr) {
  const auto backend = MakeCpuBackend(2);
  auto bytes = EncodeShard(*backend, k.View(), std::nullopt, OptionsOf(profile), report);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
  return *std::move(bytes);
}

TEST(KeysOnly, BlocksAreThoseOfAShardWithValues) {
  const auto backend = MakeCpuBackend(2);
  for (const TensorShape shape : {kLatent, kRotary, TensorShape{130, 3, 80}}) {
    const Tensor k = Keys(shape);
    for (const ProfileInfo& profile : testing::PlainProfiles()) {
      const std::string bytes = EncodeKeys(k, profile.profile);
      const auto both =
          *EncodeShard(*backend, k.View(), k.View(), OptionsOf(profile.profile), nullptr);
      const auto keys = Shard::Parse(bytes);
      const auto whole = Shard::Parse(both);
      ASSERT_TRUE(keys.ok() && whole.ok()) << keys.status();
      EXPECT_TRUE(keys->header().keys_only);
      EXPECT_FALSE(whole->header().keys_only);
      ASSERT_EQ(2 * keys->blocks().size(), whole->blocks().size());
      EXPECT_EQ(2 * keys->header().raw_bytes(), whole->header().raw_bytes());
      for (const BlockView& block : keys->blocks()) {
        const BlockView& other = whole->blocks()[block.index];
        EXPECT_EQ(block.kind, Kind::kKey);
        EXPECT_EQ(block.rank, other.rank);
        EXPECT_TRUE(std::ranges::equal(block.factors, other.factors));
        EXPECT_TRUE(std::ranges::equal(block.scales, other.scales));
        EXPECT_TRUE(std::ranges::equal(block.codes, other.codes));
      }
      for (const DecodeForm form : {DecodeForm::kFull, DecodeForm::kLowRank}) {
        const auto a = testing::DecodeAll(*backend, bytes, form);
        const auto b = testing::DecodeAll(*backend, both, form);
        ASSERT_TRUE(a.ok() && b.ok()) << a.status();
        EXPECT_EQ(a->k.values, b->k.values) << profile.name;
        EXPECT_TRUE(a->v.values.empty());
      }
    }
  }
}

TEST(KeysOnly, ReportsCountKeysAlone) {
  const auto backend = MakeCpuBackend(2);
  const Tensor k = Keys(kLatent);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    ShardReport report;
    const std::string bytes = EncodeKeys(k, profile.profile, &report);
    const auto shard = Shard::Parse(bytes);
    ASSERT_TRUE(shard.ok());
    const auto measured = MeasureShard(*backend, *shard, k.View(), std::nullopt);
    ASSERT_TRUE(measured.ok()) << measured.status();
    for (const ShardReport& found : {report, *measured}) {
      EXPECT_EQ(found.entries(), kLatent.entries());
      EXPECT_EQ(found.raw_bytes, kLatent.entries() * 4);
      EXPECT_EQ(found.encoded_bytes, bytes.size());
      EXPECT_EQ(found.k.bytes, bytes.size());
      EXPECT_EQ(found.k.blocks, 3U);
      EXPECT_EQ(found.v.bytes + found.v.entries + found.v.blocks, 0U);
      EXPECT_EQ(found.v.bits_per_entry(), 0);
    }
    EXPECT_NEAR(report.k.relative_error(), measured->k.relative_error(),
                0.01 * measured->k.relative_error())
        << profile.name;
  }
}

// An MLA layer: logits are those of the latent and of the rotary part together, which two shards
// give.
TEST(KeysOnly, AttentionGivesScoresAndRefusesOutput) {
  const auto backend = MakeCpuBackend(2);
  const Tensor k = Keys(kLatent);
  const AttentionParams params{2, 4, 0, 0, -1, 0};
  const Tensor q = testing::Gaussian({2, 4, 512}, 72);
  const std::string bytes = EncodeKeys(k, Profile::kKvs2);
  const auto shard = Shard::Parse(bytes);
  const auto decoded = testing::DecodeAll(*backend, bytes);
  ASSERT_TRUE(shard.ok() && decoded.ok());
  std::vector<float> logits(size_t{2} * 4 * 300);
  ASSERT_TRUE(AttentionScores(*backend, *shard, params, q.values.data(), logits.data()).ok());
  for (size_t row = 0; row < 8; ++row) {
    for (uint32_t t = 0; t < 300; ++t) {
      double expected = 0;
      for (size_t c = 0; c < 512; ++c) {
        expected += static_cast<double>(q.values[row * 512 + c]) *
                    static_cast<double>(decoded->k.values[t * size_t{512} + c]);
      }
      ASSERT_NEAR(static_cast<double>(logits[row * 300 + t]), expected / std::sqrt(512.0), 1e-3);
    }
  }
  AttentionAccumulator accumulator(params, 512);
  const absl::Status status = accumulator.Add(*backend, *shard, q.values.data());
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(std::string(status.message()).find("keys only"), std::string::npos) << status;
}

TEST(KeysOnly, ArgumentsMustFitTheShard) {
  const auto backend = MakeCpuBackend(1);
  const Tensor k = Keys({20, 1, 64});
  Tensor out = testing::Zeros(k.shape);
  const std::string keys = EncodeKeys(k, Profile::kKvs2);
  const std::string both = *EncodeShard(*backend, k.View(), k.View(), {});
  const auto code = [&](const std::string& bytes, bool values) {
    const auto shard = *Shard::Parse(bytes);
    const auto v = values ? std::optional(out.MutableView()) : std::nullopt;
    const auto source = values ? std::optional(k.View()) : std::nullopt;
    EXPECT_EQ(MeasureShard(*backend, shard, k.View(), source).ok(),
              values != shard.header().keys_only);
    return DecodeShard(*backend, shard, DecodeForm::kFull, out.MutableView(), v).code();
  };
  EXPECT_EQ(code(keys, false), absl::StatusCode::kOk);
  EXPECT_EQ(code(both, true), absl::StatusCode::kOk);
  EXPECT_EQ(code(keys, true), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(both, false), absl::StatusCode::kInvalidArgument);
}

// The flag decides how many blocks there are: flipped, with the header signed again, what follows
// contradicts it.
TEST(KeysOnly, AFlippedFlagIsRefused) {
  const auto backend = MakeCpuBackend(1);
  const Tensor k = Keys({140, 1, 16});
  const std::string keys = EncodeKeys(k, Profile::kKvs2);
  const std::string both = *EncodeShard(*backend, k.View(), k.View(), {});
  for (std::string bytes : {keys, both}) {
    auto* data = reinterpret_cast<uint8_t*>(bytes.data());
    data[format::offset::kFlags] ^= 1;
    format::StoreLittle(format::HeaderChecksum(data, format::offset::kHeaderChecksum),
                        data + format::offset::kHeaderChecksum);
    EXPECT_EQ(Shard::Parse(bytes).status().code(), absl::StatusCode::kDataLoss);
  }
}

TEST(KeysOnly, EveryTruncationIsSeen) {
  const std::string good = EncodeKeys(Keys({140, 1, 16}), Profile::kKvs2);
  const size_t preview = Shard::Parse(good)->preview_bytes();
  for (size_t size = 0; size < good.size(); ++size) {
    const std::string_view cut = std::string_view(good).substr(0, size);
    EXPECT_FALSE(Shard::Parse(cut).ok()) << size;
    EXPECT_EQ(Shard::Parse(cut, Extent::kAllowPreview).ok(), size >= preview) << size;
  }
}

}  // namespace
}  // namespace kvshrink
