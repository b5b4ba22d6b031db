#include "stages/rotate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "cpu/loops.h"
#include "cpu/rotation_signs.h"

namespace kvshrink::stages {
namespace {

const uint32_t kLengths[] = {1, 2, 3, 5, 31, 64, 80, 96, 100, 127, 128, 192, 256, 511, 512};

std::vector<double> Random(uint32_t length, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> x(length);
  for (double& value : x) {
    value = normal(random);
  }
  return x;
}

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

TEST(Rotation, KeepsInnerProductsAndInverts) {
  for (const uint32_t length : kLengths) {
    const Rotation<double> rotation(kRowSeed, length);
    const std::vector<double> a = Random(length, 1);
    const std::vector<double> b = Random(length, 2);
    std::vector<double> rotated_a = a;
    std::vector<double> rotated_b = b;
    rotation.Apply(rotated_a.data());
    rotation.Apply(rotated_b.data());
    EXPECT_NEAR(Dot(rotated_a, rotated_b), Dot(a, b), 1e-12 * length) << length;
    rotation.ApplyInverse(rotated_a.data());
    for (uint32_t i = 0; i < length; ++i) {
      EXPECT_NEAR(rotated_a[i], a[i], 1e-13 * length) << length;
    }
  }
}

TEST(Rotation, FollowsTheDefinition) {
  // d = 6: pass 1 on 0..3, pass 2 on 2..5 with the next seed.
  const std::vector<double> x = Random(6, 3);
  std::vector<double> expected = x;
  const auto pass = [&](size_t start, uint32_t seed, uint32_t first_sign) {
    std::vector<double> y(4);
    for (uint32_t i = 0; i < 4; ++i) {
      for (uint32_t j = 0; j < 4; ++j) {
        const double sign = SignIsNegative(seed, first_sign + j) ? -1 : 1;
        y[i] += (__builtin_popcount(i & j) % 2 != 0 ? -1 : 1) * sign * expected[start + j] / 2;
      }
    }
    std::copy(y.begin(), y.end(), expected.begin() + static_cast<std::ptrdiff_t>(start));
  };
  pass(0, kChannelSeed, 0);
  pass(2, kChannelSeed + 1, 2);
  std::vector<double> actual = x;
  Rotation<double>(kChannelSeed, 6).Apply(actual.data());
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_NEAR(actual[i], expected[i], 1e-14);
  }
}

TEST(Rotation, SeveralVectorsAtOnce) {
  const Rotation<double> rotation(kTokenSeed, 96);
  std::vector<double> together = Random(96 * 3, 4);
  std::vector<double> alone(96);
  for (size_t i = 0; i < 96; ++i) {
    alone[i] = together[i * 3 + 1];
  }
  rotation.Apply(together.data(), 3, 3);
  rotation.Apply(alone.data());
  for (size_t i = 0; i < 96; ++i) {
    EXPECT_EQ(together[i * 3 + 1], alone[i]);
  }
}

TEST(Rotation, LoopsOfTheCpuBackendAgree) {
  const cpu::Loops& loops = cpu::ChooseLoops();
  for (const uint32_t d : kLengths) {
    const std::vector<float> signs = cpu::MakeSigns(kRowSeed, d);
    const std::vector<double> wide = Random(d * 3, 5);
    std::vector<float> rows(wide.begin(), wide.end());
    std::vector<double> expected(rows.begin(), rows.end());
    loops.rotate(signs.data(), 3, d, rows.data());
    const Rotation<double> rotation(kRowSeed, d);
    for (size_t t = 0; t < 3; ++t) {
      rotation.Apply(expected.data() + t * d);
    }
    // At most 2 x 9 butterflies and 2 products round, each by half a unit of values that stay below
    // 5 sqrt(512).
    for (size_t i = 0; i < rows.size(); ++i) {
      EXPECT_NEAR(static_cast<double>(rows[i]), expected[i], 20 * 0x1p-24 * 5 * std::sqrt(512.0))
          << d;
    }
    loops.rotate_inverse(signs.data(), 3, d, rows.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      EXPECT_NEAR(static_cast<double>(rows[i]), wide[i], 40 * 0x1p-24 * 5 * std::sqrt(512.0)) << d;
    }
  }
}

TEST(Rotation, SignsLookRandom) {
  // 3 standard deviations of a fair coin, over each seed's first 512 signs and between neighbouring
  // seeds.
  for (const uint32_t seed : {1U, 2U, 3U, 4U, 5U, 6U, 16U, 31U}) {
    int sum = 0;
    int correlation = 0;
    for (uint32_t j = 0; j < 512; ++j) {
      sum += SignIsNegative(seed, j) ? -1 : 1;
      correlation += SignIsNegative(seed, j) == SignIsNegative(seed + 1, j) ? 1 : -1;
    }
    EXPECT_LT(std::abs(sum), 3 * std::sqrt(512.0)) << seed;
    EXPECT_LT(std::abs(correlation), 3 * std::sqrt(512.0)) << seed;
  }
}

}  // namespace
}  // namespace kvshrink::stages
