// Rank rule, factor coding, the solve between them, and the subspace step.
#include "stages/kvs_factors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "stages/subspace.h"

namespace kvshrink::stages {
namespace {

TEST(RankRule, NoiseAloneGetsNoComponent) {
  // The largest eigenvalue of 128 x 64 noise is (1 + sqrt(1/2))^2 = 2.9 of the mean: too little for
  // 2 (128 + 64) bits and more.
  std::vector<double> lambda(16, 2.9 * 128);
  EXPECT_EQ(ChooseRank(lambda.data(), 16, 128.0 * 64, 128, 64, RankPolicy{}).rank, 0);
}

TEST(RankRule, DominantComponentGetsTheMostBits) {
  // A first component of 99.9% of the energy, as in biased keys.
  std::vector<double> lambda = {999.0, 0.3, 0.1, 0.02};
  const RankChoice choice = ChooseRank(lambda.data(), 4, 1000.0, 128, 64, RankPolicy{});
  ASSERT_GE(choice.rank, 2);
  EXPECT_GE(choice.bits[0].token, 6);
  EXPECT_GE(choice.bits[0].channel, 6);
  EXPECT_LT(choice.bits[1].token, choice.bits[0].token);
}

TEST(RankRule, IsTheArgumentMinimumOfTheCost) {
  std::vector<double> lambda = {500, 200, 50, 20, 5};
  const double energy = 900;
  const RankPolicy policy{1.3, 12};
  const RankChoice choice = ChooseRank(lambda.data(), 5, energy, 100, 80, policy);
  double left = energy;
  for (int i = 0; i <= choice.rank && i < 5; ++i) {
    double best = INFINITY;
    FactorBits best_bits;
    for (int x = 2; x <= 8; ++x) {
      for (int y = std::max(2, x - 1); y <= std::min(8, x + 2); ++y) {
        const double distortion = FactorCodebook(x).distortion + FactorCodebook(y).distortion;
        const double cost =
            std::log((left - lambda[static_cast<size_t>(i)] * (1 - distortion)) / left) +
            policy.price * 2 * std::log(2.0) / 8000 * (x * 100 + y * 80 + 16);
        if (cost < best) {
          best = cost;
          best_bits = {x, y};
        }
      }
    }
    if (i == choice.rank) {
      EXPECT_GE(best, 0);
      break;
    }
    EXPECT_LT(best, 0);
    EXPECT_EQ(choice.bits[static_cast<size_t>(i)].token, best_bits.token);
    EXPECT_EQ(choice.bits[static_cast<size_t>(i)].channel, best_bits.channel);
    left -= lambda[static_cast<size_t>(i)];
  }
}

TEST(RankRule, CapIsThePolicys) {
  std::vector<double> lambda;
  for (int i = 0; i < 16; ++i) {
    lambda.push_back(std::exp2(-i));
  }
  for (const Kind kind : {Kind::kKey, Kind::kValue}) {
    const RankPolicy policy = RankPolicyOf(kind);
    EXPECT_EQ(ChooseRank(lambda.data(), 16, 2.0, 128, 64, policy).rank, policy.cap);
  }
  EXPECT_LT(RankPolicyOf(Kind::kKey).price, RankPolicyOf(Kind::kValue).price);
}

TEST(RankRule, ExactLowRankEndsWithoutNumbersThatAreNone) {
  std::vector<double> lambda = {10, 0, 0};
  EXPECT_EQ(ChooseRank(lambda.data(), 3, 10.0, 128, 64, RankPolicy{}).rank, 1);
  EXPECT_EQ(ChooseRank(lambda.data(), 3, 0.0, 128, 64, RankPolicy{}).rank, 0);
}

TEST(Factors, MoreBitsLessError) {
  const uint32_t d = 96;
  const Rotation<double> rotation(kChannelSeed, d);
  std::mt19937 random(3);
  std::vector<double> v(d);
  double energy = 0;
  for (double& value : v) {
    value = std::normal_distribution<double>()(random);
    energy += value * value;
  }
  for (double& value : v) {
    value /= std::sqrt(energy);
  }
  for (int bits = kMinFactorBits; bits <= kMaxFactorBits; ++bits) {
    std::vector<double> work = v;
    FactorDigits digits;
    CodeChannelFactor(rotation, bits, work.data(), &digits);
    DecodeChannelFactor(rotation, bits, digits, work.data());
    double error = 0;
    double norm = 0;
    for (uint32_t c = 0; c < d; ++c) {
      error += (work[c] - v[c]) * (work[c] - v[c]);
      norm += work[c] * work[c];
    }
    EXPECT_NEAR(norm, 1, 1e-12);
    // One draw of 96 numbers: its error scatters around the distortion.
    EXPECT_LT(error, 1.6 * FactorCodebook(bits).distortion) << bits;
    EXPECT_GT(error, 0.5 * FactorCodebook(bits).distortion) << bits;
  }
}

TEST(Factors, RecordRoundTrip) {
  std::mt19937 random(5);
  std::vector<KvsComponent> components(3);
  std::vector<FactorBits> bits = {{8, 8}, {2, 3}, {5, 4}};
  for (size_t i = 0; i < 3; ++i) {
    components[i].bits = bits[i];
    components[i].scale = static_cast<uint8_t>(100 + i);
    const auto draw = [&](int width) {
      return static_cast<uint8_t>(std::uniform_int_distribution<int>(0, (1 << width) - 1)(random));
    };
    for (int c = 0; c < 33; ++c) {
      components[i].channel.push_back(draw(bits[i].channel));
    }
    for (int t = 0; t < 17; ++t) {
      components[i].token.push_back(draw(bits[i].token));
    }
  }
  std::vector<uint8_t> record;
  WriteKvsFactors(components, &record);
  EXPECT_EQ(record.size(), KvsFactorBytes(bits, 17, 33));
  std::vector<KvsComponent> back;
  ReadKvsFactors(record, 3, 17, 33, &back);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(back[i].bits.token, bits[i].token);
    EXPECT_EQ(back[i].bits.channel, bits[i].channel);
    EXPECT_EQ(back[i].scale, components[i].scale);
    EXPECT_EQ(back[i].channel, components[i].channel);
    EXPECT_EQ(back[i].token, components[i].token);
  }
}

TEST(SolveGram, SolvesAndDropsDependentRows) {
  // G = [[2, 1], [1, 3]], two right-hand sides.
  double g[] = {2, 1, 1, 3};
  double b[] = {3, 4, 5, 7};
  SolveGram(g, 2, 2, b, 2, 2);
  EXPECT_NEAR(b[0], 0.8, 1e-14);
  EXPECT_NEAR(b[2], 1.4, 1e-14);
  EXPECT_NEAR(b[1], 1, 1e-14);
  EXPECT_NEAR(b[3], 2, 1e-14);
  double same[] = {1, 1, 1, 1};
  double right[] = {2, 2};
  SolveGram(same, 2, 2, right, 1, 1);
  EXPECT_NEAR(right[0], 2, 1e-14);
  EXPECT_EQ(right[1], 0);
}

TEST(Subspace, OrthonormalisingFactor) {
  std::mt19937 random(9);
  std::normal_distribution<double> normal;
  constexpr int kRows = 40;
  std::vector<double> z(kRows * kProbes);
  for (double& value : z) {
    value = normal(random);
  }
  for (int row = 0; row < kRows; ++row) {
    z[static_cast<size_t>(row * kProbes + 5)] =
        2 * z[static_cast<size_t>(row * kProbes + 1)];  // dependent
  }
  std::vector<double> gram(kProbes * kProbes);
  const auto fill_gram = [&](const std::vector<double>& columns) {
    for (int i = 0; i < kProbes; ++i) {
      for (int j = 0; j < kProbes; ++j) {
        double sum = 0;
        for (int row = 0; row < kRows; ++row) {
          sum += columns[static_cast<size_t>(row * kProbes + i)] *
                 columns[static_cast<size_t>(row * kProbes + j)];
        }
        gram[static_cast<size_t>(i * kProbes + j)] = sum;
      }
    }
  };
  fill_gram(z);
  std::vector<double> w(kProbes * kProbes);
  OrthonormalisingFactor(gram.data(), 1e-12, w.data());
  std::vector<double> q(z.size());
  for (int row = 0; row < kRows; ++row) {
    for (int j = 0; j < kProbes; ++j) {
      for (int i = 0; i < kProbes; ++i) {
        q[static_cast<size_t>(row * kProbes + j)] +=
            z[static_cast<size_t>(row * kProbes + i)] * w[static_cast<size_t>(i * kProbes + j)];
      }
    }
  }
  fill_gram(q);
  for (int i = 0; i < kProbes; ++i) {
    for (int j = 0; j < kProbes; ++j) {
      EXPECT_NEAR(gram[static_cast<size_t>(i * kProbes + j)], i == j && i != 5 ? 1 : 0, 1e-10)
          << i << " " << j;
    }
  }
}

}  // namespace
}  // namespace kvshrink::stages
