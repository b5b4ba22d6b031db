// The literal profile's spectrum stage on matrices whose answer random-matrix theory knows.
#include "stages/eoptshrink.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>
#include <random>

namespace kvshrink::stages {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Noise of variance 1 / n, so that its eigenvalues fill the Marchenko-Pastur law of edge (1 +
// sqrt(beta))^2; plus spikes.
Matrix Spiked(int n, int d, const std::vector<double>& strengths, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Matrix x(n, d);
  for (Eigen::Index i = 0; i < x.size(); ++i) {
    x.data()[i] = normal(random) / std::sqrt(static_cast<double>(n));
  }
  for (const double strength : strengths) {
    Eigen::VectorXd u(n);
    Eigen::VectorXd v(d);
    for (double& value : u) {
      value = normal(random);
    }
    for (double& value : v) {
      value = normal(random);
    }
    x += strength * u.normalized() * v.normalized().transpose();
  }
  return x;
}

std::vector<double> Eigenvalues(const Matrix& x) {
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(Matrix(x.transpose() * x));
  std::vector<double> values(solver.eigenvalues().data(), solver.eigenvalues().data() + x.cols());
  std::reverse(values.begin(), values.end());
  return values;
}

TEST(OptimalShrinkage, PureNoiseHasRankZero) {
  for (uint32_t seed = 0; seed < 10; ++seed) {
    const ShrinkageResult result = OptimalShrinkage(Eigenvalues(Spiked(128, 64, {}, seed)), 128);
    EXPECT_EQ(result.rank, 0) << seed;
    // The true edge is (1 + sqrt(1/2))^2 = 2.914; finite size moves it by p^(-2/3) of itself.
    EXPECT_NEAR(result.bulk_edge, 2.914, 2.914 * std::pow(64, -2.0 / 3) * 3) << seed;
  }
}

TEST(OptimalShrinkage, FindsStrongSpikesAndShrinksThemAsTheoryDoes) {
  double shrunk = 0;
  double observed = 0;
  constexpr int kDraws = 20;
  constexpr double kStrength = 4;
  for (uint32_t seed = 0; seed < kDraws; ++seed) {
    const std::vector<double> lambda = Eigenvalues(Spiked(128, 64, {kStrength}, seed));
    const ShrinkageResult result = OptimalShrinkage(lambda, 128);
    ASSERT_EQ(result.rank, 1) << seed;
    shrunk += result.shrunk[0] / kDraws;
    observed += std::sqrt(lambda[0]) / kDraws;
  }
  // Gavish and Donoho 2017, Frobenius loss, white noise: y = sqrt((t + 1/t)(t + beta/t)), eta =
  // sqrt((y^2 - beta - 1)^2 - 4 beta) / y.
  const double beta = 0.5;
  const double y = std::sqrt((kStrength + 1 / kStrength) * (kStrength + beta / kStrength));
  const double eta = std::sqrt((y * y - beta - 1) * (y * y - beta - 1) - 4 * beta) / y;
  EXPECT_NEAR(observed, y, 0.1);
  EXPECT_NEAR(shrunk, eta, 0.1);
  EXPECT_LT(shrunk, observed - 0.1);
}

TEST(OptimalShrinkage, SmallOrEmptySpectraHaveRankZero) {
  EXPECT_EQ(OptimalShrinkage(std::vector<double>{1, 0.5}, 128).rank, 0);
  EXPECT_EQ(OptimalShrinkage(std::vector<double>(64, 0.0), 128).rank, 0);
  EXPECT_EQ(OptimalShrinkage(std::vector<double>{3}, 3).rank, 0);
}

TEST(EOptShrinkFactors, RecordDecodesToTheLowRankPart) {
  const Matrix x = Spiked(128, 64, {30, 50}, 3);
  const EOptShrinkFactors factors = CodeEOptShrinkFactors(x.data(), 128, 64);
  ASSERT_EQ(factors.rank, 2);
  EXPECT_EQ(factors.record.size(), EOptShrinkFactorBytes(2, 128, 64));
  std::vector<float> token;
  std::vector<float> channel;
  ASSERT_TRUE(ReadEOptShrinkFactors(factors.record, 2, 128, 64, &token, &channel));
  double error = 0;
  double energy = 0;
  for (size_t t = 0; t < 128; ++t) {
    for (size_t c = 0; c < 64; ++c) {
      double value = 0;
      for (size_t i = 0; i < 2; ++i) {
        value += static_cast<double>(token[t * 2 + i]) * static_cast<double>(channel[i * 64 + c]);
      }
      const double exact = factors.low[t * 64 + c];
      error += (value - exact) * (value - exact);
      energy += exact * exact;
    }
  }
  // 4 bits on both sides: twice 0.0095, and less for a fitted codebook.
  EXPECT_LT(error / energy, 2 * 0.0095 * 1.3);
  EXPECT_GT(error, 0);
  std::vector<uint8_t> broken = factors.record;
  broken[1] = 0x7C;  // infinity
  broken[0] = 0;
  EXPECT_FALSE(ReadEOptShrinkFactors(broken, 2, 128, 64, &token, &channel));
}

}  // namespace
}  // namespace kvshrink::stages
