// Attention on the compressed form against plain attention over the decoded tensors.
#include "kvshrink/attention.h"

#include <gtest/gtest.h>

#include <cmath>

#include "blocks.h"

namespace kvshrink {
namespace {

using testing::DecodeAll;
using testing::Decoded;
using testing::OptionsOf;
using testing::Tensor;

struct Plain {
  std::vector<double> logits;  // [Q, q_heads, T]
  std::vector<double> output;  // [Q, q_heads, d]
  std::vector<double> lse;
};

Plain NaiveAttention(const Decoded& kv, const AttentionParams& params, int64_t first_token,
                     const std::vector<float>& q) {
  const TensorShape& shape = kv.k.shape;
  const uint32_t d = shape.head_dim;
  const uint32_t group = params.q_heads / shape.kv_heads;
  const double scale =
      params.scale != 0 ? static_cast<double>(params.scale) : 1 / std::sqrt(static_cast<double>(d));
  Plain plain;
  for (uint32_t i = 0; i < params.queries; ++i) {
    for (uint32_t h = 0; h < params.q_heads; ++h) {
      std::vector<double> row;
      for (uint32_t t = 0; t < shape.tokens; ++t) {
        double dot = 0;
        for (uint32_t c = 0; c < d; ++c) {
          dot += static_cast<double>(q[(size_t{i} * params.q_heads + h) * d + c]) *
                 static_cast<double>(kv.k.values[kv.k.View().layout.Offset(t, h / group) + c]);
        }
        dot *= scale;
        if (params.softcap > 0) {
          dot = static_cast<double>(params.softcap) *
                std::tanh(dot / static_cast<double>(params.softcap));
        }
        const int64_t own = params.first_query + i;
        const int64_t position = first_token + t;
        const bool sees =
            params.first_query < 0 ||
            (position <= own && (params.window == 0 || position > own - int64_t{params.window}));
        row.push_back(sees ? dot : -INFINITY);
      }
      double sum = 0;
      std::vector<double> output(d);
      for (uint32_t t = 0; t < shape.tokens; ++t) {
        const double weight = std::exp(row[t]);
        sum += weight;
        for (uint32_t c = 0; c < d; ++c) {
          output[c] += weight * static_cast<double>(
                                    kv.v.values[kv.v.View().layout.Offset(t, h / group) + c]);
        }
      }
      for (double& value : output) {
        value = sum > 0 ? value / sum : 0;
      }
      plain.logits.insert(plain.logits.end(), row.begin(), row.end());
      plain.output.insert(plain.output.end(), output.begin(), output.end());
      plain.lse.push_back(std::log(sum));
    }
  }
  return plain;
}

void ExpectNear(std::span<const float> actual, const std::vector<double>& expected,
                double tolerance, const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isinf(expected[i])) {
      ASSERT_EQ(static_cast<double>(actual[i]), expected[i]) << what << " " << i;
    } else {
      ASSERT_NEAR(static_cast<double>(actual[i]), expected[i], tolerance) << what << " " << i;
    }
  }
}

std::vector<AttentionParams> ParamCases() {
  AttentionParams all{3, 6, 0, 0, -1, 0};
  AttentionParams causal{5, 2, 0.2F, 0, 198, 0};
  AttentionParams window{5, 4, 0, 0, 210, 70};
  AttentionParams capped{2, 6, 0.5F, 3.0F, -1, 0};
  AttentionParams before{2, 2, 0, 0, 3, 0};  // sees nothing: the chunk starts later
  return {all, causal, window, capped, before};
}

// A logit is a dot product of d terms in float: sqrt(d) rounding errors of 2^-24 of terms below 5 *
// 5 in the worst case, and the sum over the rank: 1e-4 covers it with d = 96 and values of a few
// units; the outputs are weighted means of values of that size.
TEST(Attend, EqualsPlainAttentionOverDecodedTensors) {
  const TensorShape shape{200, 2, 96};
  Tensor k = testing::LowRankPlusNoise(shape, 4, 0.2F, 1);
  const Tensor v = testing::LowRankPlusNoise(shape, 2, 0.5F, 2);
  k.at(150, 1, 3) = 7;
  const auto cpu = MakeCpuBackend(2);
  const auto reference = MakeReferenceBackend();
  std::vector<EncodeOptions> cases;
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    EncodeOptions options = OptionsOf(profile.profile);
    options.first_token = 2;
    cases.push_back(options);
    options.rope = Rope{.theta = 1e5, .rotary_dim = 64};
    cases.push_back(options);
  }
  for (const EncodeOptions& options : cases) {
    const auto bytes = EncodeShard(*cpu, k.View(), v.View(), options);
    ASSERT_TRUE(bytes.ok());
    const auto shard = Shard::Parse(*bytes);
    const auto decoded = DecodeAll(*cpu, *bytes);
    ASSERT_TRUE(shard.ok() && decoded.ok());
    for (const AttentionParams& params : ParamCases()) {
      const std::vector<float> q =
          testing::Gaussian({params.queries, params.q_heads, 96}, 7).values;
      const Plain plain = NaiveAttention(*decoded, params, 2, q);
      for (const Backend* backend : {cpu.get(), reference.get()}) {
        const std::string what = std::string(GetProfileInfo(options.profile).name) + " " +
                                 std::string(backend->name()) +
                                 (options.rope.has_value() ? " rope" : "");
        std::vector<float> logits(size_t{params.queries} * params.q_heads * shape.tokens);
        ASSERT_TRUE(AttentionScores(*backend, *shard, params, q.data(), logits.data()).ok());
        ExpectNear(logits, plain.logits, 1e-4, what);
        AttentionAccumulator accumulator(params, 96);
        ASSERT_TRUE(accumulator.Add(*backend, *shard, q.data()).ok());
        ExpectNear(accumulator.output(), plain.output, 1e-4, what);
        ExpectNear(accumulator.lse(), plain.lse, 1e-4, what);
      }
    }
  }
}

TEST(Attend, ChunksMergeToTheWhole) {
  const TensorShape whole{256, 1, 64};
  const Tensor k = testing::Gaussian(whole, 11);
  const Tensor v = testing::Gaussian(whole, 12);
  const auto backend = MakeCpuBackend(1);
  const AttentionParams params{4, 3, 0, 0, 250, 0};
  const std::vector<float> q = testing::Gaussian({4, 3, 64}, 13).values;
  // The raw profile: chunks and whole hold the same numbers.
  const auto encode = [&](uint32_t first, uint32_t tokens) {
    ConstTensor part_k = k.View();
    ConstTensor part_v = v.View();
    part_k.data += size_t{first} * 64 * sizeof(float);
    part_v.data += size_t{first} * 64 * sizeof(float);
    part_k.shape.tokens = tokens;
    part_v.shape.tokens = tokens;
    EncodeOptions options = OptionsOf(Profile::kRaw);
    options.first_token = first;
    return *EncodeShard(*backend, part_k, part_v, options);
  };
  const std::string all = encode(0, 256);
  AttentionAccumulator expected(params, 64);
  ASSERT_TRUE(expected.Add(*backend, *Shard::Parse(all), q.data()).ok());
  AttentionAccumulator merged(params, 64);
  for (const auto& [first, tokens] :
       {std::pair(0U, 100U), std::pair(100U, 28U), std::pair(128U, 128U)}) {
    const std::string part = encode(first, tokens);
    ASSERT_TRUE(merged.Add(*backend, *Shard::Parse(part), q.data()).ok());
  }
  for (size_t i = 0; i < expected.output().size(); ++i) {
    EXPECT_NEAR(merged.output()[i], expected.output()[i], 1e-5F);
  }
  for (size_t i = 0; i < expected.lse().size(); ++i) {
    EXPECT_NEAR(merged.lse()[i], expected.lse()[i], 1e-5F);
  }
}

TEST(Attend, MergeWithNothingSeenChangesNothing) {
  const float minus_infinity = -INFINITY;
  std::vector<float> output = {1, 2};
  float lse = 0.5F;
  const std::vector<float> nothing = {0, 0};
  MergeAttention(1, 2, nothing.data(), &minus_infinity, output.data(), &lse);
  EXPECT_EQ(output, (std::vector<float>{1, 2}));
  EXPECT_EQ(lse, 0.5F);
  std::vector<float> empty = {0, 0};
  float empty_lse = minus_infinity;
  MergeAttention(1, 2, output.data(), &lse, empty.data(), &empty_lse);
  EXPECT_EQ(empty, output);
  EXPECT_EQ(empty_lse, lse);
}

TEST(Attend, BadParametersNameTheField) {
  ShardHeader header;
  header.shape = {10, 2, 64};
  const auto message = [&](AttentionParams params) {
    const absl::Status status = ValidateAttention(params, header);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_NE(message({0, 2}).find("'queries' is 0"), std::string::npos);
  EXPECT_NE(message({1, 3}).find("'q_heads' is 3"), std::string::npos);
  EXPECT_NE(message({1, 2, NAN}).find("'scale'"), std::string::npos);
  EXPECT_NE(message({1, 2, 0, -1}).find("'softcap' is -1"), std::string::npos);
  EXPECT_NE(message({1, 2, 0, 0, -1, 5}).find("'window' is 5"), std::string::npos);
}

}  // namespace
}  // namespace kvshrink
