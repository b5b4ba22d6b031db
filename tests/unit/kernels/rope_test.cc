// The rotary embedding: its angles against published formulas, and coding before it.
#include "kvshrink/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "blocks.h"
#include "rope_rows.h"
#include "stages/rope.h"

namespace kvshrink {
namespace {

using testing::DecodeAll;
using testing::OptionsOf;
using testing::Tensor;

Rope Plain(double theta, uint32_t rotary_dim, RopePairing pairing = RopePairing::kNeox) {
  Rope rope;
  rope.theta = theta;
  rope.rotary_dim = rotary_dim;
  rope.pairing = pairing;
  return rope;
}

Rope Scaled(double theta, uint32_t rotary_dim, RopeScaling scaling, double factor,
            double original_max_position = 0) {
  Rope rope = Plain(theta, rotary_dim);
  rope.scaling = scaling;
  rope.factor = factor;
  rope.original_max_position = original_max_position;
  return rope;
}

// Expected values: the formulas of the model library that published them, evaluated in double by a
// program of its own.
TEST(Rope, FrequenciesOfEveryScaling) {
  struct Case {
    std::string name;
    Rope rope;
    std::vector<std::pair<uint32_t, double>> expected;
  };
  const std::vector<Case> cases = {
      {"none", Plain(1e6, 128), {{0, 1.0}, {1, 0.8058421877614819}, {63, 1.2409377607517195e-06}}},
      {"part of a head",
       Plain(10000, 32),
       {{0, 1.0}, {5, 0.05623413251903491}, {15, 0.00017782794100389227}}},
      {"linear",
       Scaled(1e6, 256, RopeScaling::kLinear, 8),
       {{0, 0.125}, {64, 0.000125}, {127, 1.3924673249935028e-07}}},
      {"ntk",
       Scaled(10000, 64, RopeScaling::kNtk, 2.5),
       {{0, 1.0}, {1, 0.7280533851903869}, {31, 5.334085728653296e-05}}},
      {"yarn",
       Scaled(1e6, 128, RopeScaling::kYarn, 4, 32768),
       {{0, 1.0},
        {23, 0.006978305848598663},
        {24, 0.005375321490790102},
        {30, 0.001064360981247002},
        {40, 4.445698525097307e-05},
        {41, 3.582531425592407e-05},
        {63, 3.102344401879299e-07}}},
      {"yarn with the range as it is",
       Scaled(150000, 64, RopeScaling::kYarnUntruncated, 32, 4096),
       {{0, 1.0},
        {8, 0.050813274815461475},
        {9, 0.03170569618466377},
        {13, 0.0038603593171920685},
        {17, 0.0001293187012450632},
        {18, 3.8308812373753384e-05},
        {31, 3.0235114281192144e-07}}},
      {"yarn of a context that is shorter than one turn",
       Scaled(10000, 32, RopeScaling::kYarn, 2, 3),
       {{0, 1.0}, {1, 0.5623413251903491}, {15, 0.00017782794100389227}}},
      {"llama3",
       Scaled(5e5, 128, RopeScaling::kLlama3, 8, 8192),
       {{0, 1.0},
        {28, 0.003211445994752591},
        {29, 0.002166570763503359},
        {32, 0.0005248461609929547},
        {35, 9.556212353964683e-05},
        {36, 7.78465527393245e-05},
        {63, 3.068925988914511e-07}}}};
  for (const Case& test : cases) {
    ASSERT_TRUE(ValidateRope(test.rope, 512).ok()) << test.name;
    for (const auto& [j, frequency] : test.expected) {
      EXPECT_NEAR(stages::RopeFrequency(test.rope, j), frequency, 1e-13 * frequency)
          << test.name << " pair " << j;
    }
  }
}

// Keys as a model embeds them, in double: `k` in place, its first token being at `position`.
void Embed(const Rope& rope, int64_t position, Tensor* k) {
  for (uint32_t t = 0; t < k->shape.tokens; ++t) {
    for (uint32_t head = 0; head < k->shape.kv_heads; ++head) {
      for (uint32_t j = 0; j < rope.rotary_dim / 2; ++j) {
        const double angle = static_cast<double>(position + t) * stages::RopeFrequency(rope, j);
        const bool neox = rope.pairing == RopePairing::kNeox;
        float& a = k->at(t, head, neox ? j : 2 * j);
        float& b = k->at(t, head, neox ? j + rope.rotary_dim / 2 : 2 * j + 1);
        const auto x = static_cast<double>(a);
        const auto y = static_cast<double>(b);
        a = static_cast<float>(x * std::cos(angle) - y * std::sin(angle));
        b = static_cast<float>(y * std::cos(angle) + x * std::sin(angle));
      }
    }
  }
}

struct Placed {
  Rope rope;
  uint32_t first_token = 0;
};

std::vector<Placed> PlacedRopes() {
  std::vector<Placed> placed;
  for (const RopePairing pairing : {RopePairing::kNeox, RopePairing::kGptj}) {
    for (const uint32_t rotary_dim : {96U, 64U, 2U}) {
      for (const uint32_t first_token : {0U, 40U, 1000000U, (1U << 31) - 301}) {
        placed.push_back({Plain(1e6, rotary_dim, pairing), first_token});
      }
    }
  }
  Rope shifted = Plain(10000, 96);
  shifted.position_offset = -1000;
  placed.push_back({shifted, 40});
  return placed;
}

// Tokens 0 .. 299 in blocks of 128; angles in double are within 2^31 2^-53 radians, turns in float
// within 3 roundings of values below 5.
TEST(Rope, RowsAreTurnedBackAndForth) {
  for (const Placed& placed : PlacedRopes()) {
    ShardHeader header;
    header.shape = {300, 1, 96};
    header.first_token = placed.first_token;
    header.extensions.rope = placed.rope;
    const Tensor plain = testing::Gaussian(header.shape, 3);
    Tensor embedded = plain;
    Embed(placed.rope, int64_t{placed.first_token} + placed.rope.position_offset, &embedded);
    const RopeRows rows(header);
    for (uint32_t b = 0; b < 3; ++b) {
      BlockView block;
      block.first_row = 128 * b;
      block.rows = b == 2 ? 44 : 128;
      block.raw_rows = b == 0 ? 5 : 0;
      const size_t begin = size_t{block.first_row + block.raw_rows} * 96;
      const size_t count = size_t{block.coded_rows()} * 96;
      std::vector<float> turned(
          embedded.values.begin() + static_cast<std::ptrdiff_t>(begin),
          embedded.values.begin() + static_cast<std::ptrdiff_t>(begin + count));
      rows.Undo(block, turned.data());
      for (size_t i = 0; i < count; ++i) {
        ASSERT_NEAR(turned[i], plain.values[begin + i], 4e-6F)
            << RopeText(placed.rope) << " from " << placed.first_token << " block " << b << " "
            << i;
      }
      rows.Redo(block, turned.data());
      for (size_t i = 0; i < count; ++i) {
        ASSERT_NEAR(turned[i], embedded.values[begin + i], 4e-6F) << RopeText(placed.rope);
      }
    }
  }
}

TEST(Rope, ValuesBeyondFloatBecomeTheLargest) {
  ShardHeader header;
  header.shape = {1, 1, 2};
  header.first_token = 1;
  header.extensions.rope = Plain(10000, 2);
  std::vector<float> row = {3e38F, -3e38F};
  BlockView block;
  block.rows = 1;
  RopeRows(header).Redo(block, row.data());
  EXPECT_EQ(row[0], std::numeric_limits<float>::max());
  EXPECT_LT(std::abs(row[1]), 1e38F);
}

absl::StatusOr<std::string> Encode(const Backend& backend, const Tensor& k, const Tensor& v,
                                   const EncodeOptions& options, ShardReport* report = nullptr) {
  return EncodeShard(backend, k.View(), v.View(), options, report);
}

// A key that all tokens share has rank 1 before the embedding, and full rank after it.
TEST(Rope, KeysAreCodedBeforeTheEmbedding) {
  const auto backend = MakeCpuBackend(2);
  for (const Placed& placed : PlacedRopes()) {
    if (placed.rope.rotary_dim < 64) {
      continue;
    }
    Tensor k = testing::Zeros({300, 2, 96});
    for (uint32_t t = 0; t < 300; ++t) {
      for (uint32_t c = 0; c < 2 * 96; ++c) {
        k.at(t, 0, c) = std::sin(static_cast<float>(c));
      }
    }
    Embed(placed.rope, int64_t{placed.first_token} + placed.rope.position_offset, &k);
    EncodeOptions options = OptionsOf(Profile::kKvs2);
    options.first_token = placed.first_token;
    ShardReport without;
    ASSERT_TRUE(Encode(*backend, k, k, options, &without).ok());
    options.rope = placed.rope;
    ShardReport with;
    const auto bytes = Encode(*backend, k, k, options, &with);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_LT(with.k.relative_error(), 2e-5) << RopeText(placed.rope) << placed.first_token;
    EXPECT_GT(without.k.relative_error(), 1e-3) << RopeText(placed.rope) << placed.first_token;
    EXPECT_EQ(with.v.relative_error(), without.v.relative_error());
    const auto shard = Shard::Parse(*bytes);
    ASSERT_TRUE(shard.ok()) << shard.status();
    EXPECT_EQ(shard->header().extensions.rope, placed.rope);
    const auto measured = MeasureShard(*backend, *shard, k.View(), k.View());
    ASSERT_TRUE(measured.ok());
    EXPECT_NEAR(measured->k.relative_error(), with.k.relative_error(),
                0.01 * with.k.relative_error() + 1e-12);
  }
}

// Layers of a model whose angles are known: theta 1e6.
TEST(Rope, RealKeysLoseLess) {
  const auto backend = MakeCpuBackend(2);
  for (const int layer : {0, 8, 22}) {
    const Tensor k = testing::QwenLayer("k", layer);
    const Tensor v = testing::QwenLayer("v", layer);
    EncodeOptions options = OptionsOf(Profile::kKvs2);
    ShardReport without;
    ASSERT_TRUE(Encode(*backend, k, v, options, &without).ok());
    options.rope = Plain(1e6, 0);
    ShardReport with;
    const auto bytes = Encode(*backend, k, v, options, &with);
    ASSERT_TRUE(bytes.ok());
    EXPECT_LT(with.k.relative_error(), 0.8 * without.k.relative_error()) << layer;
    EXPECT_EQ(Shard::Parse(*bytes)->header().extensions.rope->rotary_dim, 64U);
  }
}

TEST(Rope, SameBytesForEveryNumberOfThreads) {
  const Tensor k = testing::QwenLayer("k", 8);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    EncodeOptions options = OptionsOf(profile.profile);
    options.rope = Scaled(5e5, 0, RopeScaling::kLlama3, 8, 8192);
    options.first_token = 777;
    const auto one = Encode(*MakeCpuBackend(1), k, k, options);
    ASSERT_TRUE(one.ok());
    for (const int threads : {2, 5}) {
      EXPECT_EQ(*Encode(*MakeCpuBackend(threads), k, k, options), *one) << profile.name;
    }
  }
}

TEST(Rope, BackendsAgree) {
  const auto cpu = MakeCpuBackend(2);
  const auto reference = MakeReferenceBackend();
  const Tensor k = testing::SmolLayer("k", 17);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    EncodeOptions options = OptionsOf(profile.profile);
    options.rope = Plain(1e5, 48, RopePairing::kGptj);
    ShardReport a;
    ShardReport b;
    const auto bytes = Encode(*cpu, k, k, options, &a);
    ASSERT_TRUE(bytes.ok() && Encode(*reference, k, k, options, &b).ok());
    EXPECT_NEAR(a.bits_per_entry(), b.bits_per_entry(), 0.002 * b.bits_per_entry());
    EXPECT_NEAR(a.k.relative_error(), b.k.relative_error(), 0.005 * b.k.relative_error());
    for (const DecodeForm form : {DecodeForm::kFull, DecodeForm::kLowRank}) {
      const auto x = DecodeAll(*cpu, *bytes, form);
      const auto y = DecodeAll(*reference, *bytes, form);
      ASSERT_TRUE(x.ok() && y.ok());
      EXPECT_LT(testing::ErrorEnergy(x->k.values, y->k.values),
                1e-10 * testing::Energy(y->k.values))
          << profile.name;
    }
  }
}

// Whatever is kept raw is kept as the caller gave it, after the embedding.
TEST(Rope, RawRowsAndBlocksAreExact) {
  const auto backend = MakeCpuBackend(2);
  Tensor k = testing::Gaussian({300, 1, 64}, 5);
  const Tensor v = testing::Gaussian({300, 1, 64}, 6);
  k.at(200, 0, 9) = INFINITY;
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    EncodeOptions options = OptionsOf(profile.profile);
    options.raw_tokens = 7;
    options.rope = Plain(10000, 0);
    const auto bytes = Encode(*backend, k, v, options);
    ASSERT_TRUE(bytes.ok());
    const auto decoded = DecodeAll(*backend, *bytes);
    ASSERT_TRUE(decoded.ok());
    for (size_t i = 0; i < k.values.size(); ++i) {
      const size_t token = i / 64;
      if (token < 7 || token / 128 == 1 || profile.profile == Profile::kRaw) {
        ASSERT_EQ(decoded->k.values[i], k.values[i]) << profile.name << " " << i;
      }
    }
    EXPECT_EQ(Shard::Parse(*bytes)->header().extensions.rope.has_value(),
              profile.profile != Profile::kRaw);
  }
}

TEST(Rope, PreviewsAndStridedOutputsAreEmbedded) {
  const auto backend = MakeCpuBackend(2);
  const Tensor k = testing::QwenLayer("k", 8);
  EncodeOptions options = OptionsOf(Profile::kKvs3);
  options.rope = Plain(1e6, 0);
  const auto bytes = Encode(*backend, k, k, options);
  ASSERT_TRUE(bytes.ok());
  const auto shard = Shard::Parse(*bytes);
  const auto low =
      DecodeAll(*backend, bytes->substr(0, shard->preview_bytes()), DecodeForm::kLowRank);
  ASSERT_TRUE(low.ok()) << low.status();
  // The low-rank part alone is near the embedded keys.
  EXPECT_LT(testing::ErrorEnergy(low->k.values, k.values), 0.05 * testing::Energy(k.values));

  const auto full = DecodeAll(*backend, *bytes);
  std::vector<float> k_htd(k.shape.entries());
  std::vector<float> v_htd(k.shape.entries());
  const auto htd = [&](std::vector<float>* values) {
    return MutableTensor{reinterpret_cast<std::byte*>(values->data()), DType::kFp32, k.shape,
                         LayoutHtd(k.shape)};
  };
  ASSERT_TRUE(DecodeShard(*backend, *shard, DecodeForm::kFull, htd(&k_htd), htd(&v_htd)).ok());
  for (uint32_t t = 0; t < k.shape.tokens; ++t) {
    for (uint32_t c = 0; c < 64; ++c) {
      ASSERT_EQ(k_htd[LayoutHtd(k.shape).Offset(t, 1) + c],
                full->k.values[LayoutThd(k.shape).Offset(t, 1) + c]);
    }
  }
}

TEST(Rope, ErrorBoundHoldsAfterTheEmbedding) {
  const auto backend = MakeCpuBackend(2);
  const Tensor k = testing::SmolLayer("k", 0);
  EncodeOptions options = OptionsOf(Profile::kKvs2);
  options.rope = Plain(1e5, 0);
  options.max_relative_error = 0.002;
  ShardReport report;
  const auto bytes = Encode(*backend, k, k, options, &report);
  ASSERT_TRUE(bytes.ok());
  EXPECT_GT(report.k.escalated_blocks, 0U);
  const auto measured = MeasureShard(*backend, *Shard::Parse(*bytes), k.View(), k.View());
  ASSERT_TRUE(measured.ok());
  EXPECT_LE(measured->k.max_block_relative_error, 0.002 * 1.001);
}

TEST(Rope, BadOptionsNameFieldAndValue) {
  const Tensor k = testing::Gaussian({4, 1, 64}, 1);
  const auto backend = MakeCpuBackend(1);
  const auto expect = [&](const Rope& rope, const std::string& message) {
    EncodeOptions options = OptionsOf(Profile::kKvs2);
    options.rope = rope;
    const absl::Status status = Encode(*backend, k, k, options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_NE(std::string(status.message()).find(message), std::string::npos) << status;
  };
  const auto with = [](auto change) {
    Rope rope = Scaled(10000, 0, RopeScaling::kLlama3, 8, 8192);
    change(&rope);
    return rope;
  };
  expect(Plain(1, 0), "'rope.theta' is 1:");
  expect(Plain(NAN, 0), "'rope.theta' is nan:");
  expect(Plain(INFINITY, 0), "'rope.theta' is inf:");
  expect(Plain(10000, 63), "'rope.rotary_dim' is 63: must be even, 2..64");
  expect(Plain(10000, 66), "'rope.rotary_dim' is 66:");
  expect(Scaled(10000, 2, RopeScaling::kNtk, 2), "'rope.rotary_dim' is 2: must be even, 4..64");
  expect(Scaled(10000, 0, RopeScaling::kLinear, 0.5), "'rope.factor' is 0.5:");
  expect(Scaled(10000, 0, RopeScaling::kNone, 8), "'rope.factor' is 8: scaling 'none' takes none");
  expect(Scaled(10000, 0, RopeScaling::kNtk, 8, 4096), "'rope.original_max_position' is 4096:");
  expect(Scaled(10000, 0, RopeScaling::kYarn, 4, 0), "'rope.original_max_position' is 0:");
  expect(with([](Rope* rope) { rope->low_freq_factor = 0; }), "'rope.low_freq_factor' is 0:");
  expect(with([](Rope* rope) { rope->high_freq_factor = 1; }), "'rope.high_freq_factor' is 1:");
  expect(with([](Rope* rope) { rope->pairing = static_cast<RopePairing>(2); }),
         "'rope.pairing' is 2:");
  expect(with([](Rope* rope) { rope->scaling = static_cast<RopeScaling>(6); }),
         "'rope.scaling' is 6:");
  Rope yarn = Scaled(10000, 0, RopeScaling::kYarn, 4, 4096);
  yarn.beta_slow = 0;
  expect(yarn, "'rope.beta_slow' is 0:");
  yarn.beta_slow = 33;
  expect(yarn, "'rope.beta_fast' is 32:");
}

}  // namespace
}  // namespace kvshrink
