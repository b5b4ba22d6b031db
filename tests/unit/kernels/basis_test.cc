// Calibrated bases: the file, its checks, the metric.
#include "kvshrink/basis.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cmath>

#include "bases.h"
#include "stages/rope.h"

namespace kvshrink {
namespace {

using testing::MakeBasis;
using testing::RandomBasis;

Rope Embedding() {
  Rope rope;
  rope.theta = 5e5;
  rope.rotary_dim = 6;
  rope.scaling = RopeScaling::kLlama3;
  rope.factor = 8;
  rope.original_max_position = 8192;
  return rope;
}

TEST(Basis, WhatIsWrittenIsRead) {
  BasisContents contents = RandomBasis(10, 3, {0, 7, 4095}, Embedding());
  contents.layers[1].rope.reset();
  contents.metadata = R"({"text":"books"})";
  const std::string bytes = WriteBasis(contents);
  const auto basis = Basis::Parse(bytes);
  ASSERT_TRUE(basis.ok()) << basis.status();
  EXPECT_EQ(basis->model(), "a model");
  EXPECT_EQ(basis->metadata(), contents.metadata);
  EXPECT_EQ(basis->head_dim(), 10U);
  EXPECT_EQ(basis->kv_heads(), 3U);
  EXPECT_EQ(basis->queries(), 100U);
  ASSERT_EQ(basis->layers().size(), 3U);
  EXPECT_EQ(basis->layers()[0].rope, Embedding());
  EXPECT_FALSE(basis->layers()[1].rope.has_value());
  EXPECT_EQ(basis->layer(7)->layer, 7U);
  EXPECT_EQ(basis->layer(8), nullptr);
  EXPECT_EQ(BasisIdText(basis->id()).size(), 32U);
}

TEST(Basis, MetricIsTheEigenvectorsAndGains) {
  const BasisContents contents = RandomBasis(33, 2, {4});
  const Basis basis = MakeBasis(contents);
  for (uint32_t head = 0; head < 2; ++head) {
    const Basis::Metric metric = basis.metric(4, head);
    for (size_t a = 0; a < 33; ++a) {
      for (size_t b = 0; b < 33; ++b) {
        double weight = 0;
        double identity = 0;
        for (size_t i = 0; i < 33; ++i) {
          const float* u = contents.layers[0].vectors.data() + (head * 33 + i) * 33;
          weight += static_cast<double>(contents.layers[0].gains[head * 33 + i]) *
                    static_cast<double>(u[a]) * static_cast<double>(u[b]);
          identity += static_cast<double>(metric.weight[a * 33 + i]) *
                      static_cast<double>(metric.inverse[i * 33 + b]);
        }
        EXPECT_NEAR(metric.weight[a * 33 + b], weight, 1e-6);
        EXPECT_NEAR(identity, a == b ? 1 : 0, 1e-5);
        EXPECT_EQ(metric.weight[a * 33 + b], metric.weight[b * 33 + a]);
        EXPECT_EQ(metric.inverse[a * 33 + b], metric.inverse[b * 33 + a]);
      }
    }
  }
}

TEST(Basis, IdIsThatOfTheContent) {
  const std::string bytes = WriteBasis(RandomBasis(4, 1, {0}));
  EXPECT_EQ(WriteBasis(RandomBasis(4, 1, {0})), bytes);
  const std::string content = bytes.substr(0, 32) + bytes.substr(48);
  const BasisId id = Basis::Parse(bytes)->id();
  for (uint64_t seed = 0; seed < 2; ++seed) {
    uint64_t half = 0;
    std::memcpy(&half, id.data() + 8 * seed, 8);
    EXPECT_EQ(half, XXH64(content.data(), content.size(), seed));
  }
  EXPECT_NE(MakeBasis(RandomBasis(4, 1, {1})).id(), id);
  for (size_t i = 0; i < bytes.size(); ++i) {
    std::string bad = bytes;
    bad[i] = static_cast<char>(bad[i] ^ 1);
    EXPECT_EQ(Basis::Parse(bad).status().code(), absl::StatusCode::kDataLoss) << i;
    EXPECT_FALSE(Basis::Parse(bytes.substr(0, i)).ok()) << i;
  }
}

// With its id made anew, so that other checks are reached.
std::string Sealed(std::string bytes) {
  const std::string content = bytes.substr(0, 32) + bytes.substr(48);
  for (uint64_t seed = 0; seed < 2; ++seed) {
    const uint64_t half = XXH64(content.data(), content.size(), seed);
    std::memcpy(bytes.data() + 32 + 8 * seed, &half, 8);
  }
  return bytes;
}

void ExpectRefused(const std::string& bytes, const std::string& field) {
  const absl::Status status = Basis::Parse(Sealed(bytes)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << field;
  EXPECT_NE(std::string(status.message()).find("'basis." + field + "'"), std::string::npos)
      << field << ": " << status;
}

TEST(Basis, EveryViolationIsRefused) {
  const std::string good = WriteBasis(RandomBasis(8, 2, {3, 5}, Embedding()));
  ASSERT_TRUE(Basis::Parse(Sealed(good)).ok());
  const auto with = [&](size_t offset, const std::string& bytes) {
    return std::string(good).replace(offset, bytes.size(), bytes);
  };
  const std::string zero(2, '\0');
  ExpectRefused(with(0, "X"), "magic");
  ExpectRefused(with(4, "\x02"), "version");
  ExpectRefused(with(6, "\x01"), "flags");
  ExpectRefused(with(8, zero), "head_dim");
  ExpectRefused(with(9, "\x03"), "head_dim");
  ExpectRefused(with(10, zero), "kv_heads");
  ExpectRefused(with(10, std::string("\x01\x01")), "kv_heads");
  ExpectRefused(with(12, zero), "layers");
  ExpectRefused(with(14, "\x01"), "layers");
  ExpectRefused(with(25, "\x01"), "model_bytes");
  ExpectRefused(with(26, "\x01"), "reserved");
  ExpectRefused(with(28, std::string("\x01\x00", 2)), "metadata_bytes");
  ExpectRefused(with(31, "\x7F"), "metadata_bytes");
  ExpectRefused(with(48, "\n"), "model");
  ExpectRefused(with(12, "\x03"), "size");
  ExpectRefused(with(12, "\x01"), "size");  // bytes left over
  ExpectRefused(good + "12345678", "size");
  ExpectRefused(good.substr(0, good.size() - 4), "layer[1].size");
  const size_t layer = 48 + 7 + 2;
  const size_t rope = layer + 8;
  const size_t head = rope + 48;
  ExpectRefused(with(layer, "\x05"), "layer[1].layer");
  ExpectRefused(with(layer + 1, "\x10"), "layer[0].layer");
  ExpectRefused(with(layer + 2, "\x28"), "layer[0].rope.size");
  ExpectRefused(with(layer + 3, "\x7F"), "layer[0].size");
  ExpectRefused(with(layer + 4, "\x01"), "layer[0].reserved");
  ExpectRefused(with(rope + 8, "\x0A"), "layer[0].rope.rotary_dim");
  const std::string nan("\x00\x00\xC0\x7F", 4);
  ExpectRefused(with(head, nan), "layer[0].head[0].gain[0]");
  ExpectRefused(with(head + 4, std::string(4, '\0')), "layer[0].head[0].gain[1]");
  ExpectRefused(with(head + 7, "\xBF"), "layer[0].head[0].gain[1]");
  ExpectRefused(with(head + 32, nan), "layer[0].head[0].vector[0]");
  ExpectRefused(with(head + 32, std::string(32, '\0')), "layer[0].head[0].vector[0]");
  const std::string second = good.substr(head + 64, 32);
  ExpectRefused(with(head + 32, second), "layer[0].head[0].vector[1]");  // twice the same
  ExpectRefused(with(head + 32 + 256, nan), "layer[0].head[1].gain[0]");
}

TEST(Basis, MisfitsNameTheField) {
  const Basis basis = MakeBasis(RandomBasis(8, 2, {3}, Embedding()));
  const auto expect = [&](uint32_t layer, uint32_t d, uint32_t heads, std::optional<Rope> rope,
                          const std::string& message) {
    const absl::Status status = CheckBasisFits(basis, layer, d, heads, rope);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_NE(std::string(status.message()).find(message), std::string::npos) << status;
  };
  Rope moved = Embedding();
  moved.position_offset = 9;
  EXPECT_TRUE(CheckBasisFits(basis, 3, 8, 2, moved).ok());
  expect(3, 16, 2, Embedding(), "'basis.head_dim' is 8: the tensors' is 16");
  expect(3, 8, 4, Embedding(), "'basis.kv_heads' is 2: the tensors' is 4");
  expect(2, 8, 2, Embedding(), "'basis.layers' is a set of 1: layer 2 is not in it");
  expect(3, 8, 2, std::nullopt, "'basis.rope' is theta=5e+05,");
  moved.theta = 10000;
  expect(3, 8, 2, moved, "'basis.rope' is theta=5e+05,");
}

// The mean over positions by turning the moment to every one of them.
TEST(Calibration, MeanOverTurnsIsThatOfEveryPosition) {
  for (const RopePairing pairing : {RopePairing::kNeox, RopePairing::kGptj}) {
    for (const uint32_t rotary_dim : {10U, 6U, 2U}) {
      constexpr uint32_t kDim = 11;
      Rope rope = Embedding();
      rope.rotary_dim = rotary_dim;
      rope.pairing = pairing;
      const Eigen::MatrixXd samples = Eigen::MatrixXd::Random(kDim, 4);
      const Eigen::MatrixXd moment = samples * samples.transpose();
      Eigen::MatrixXd expected = Eigen::MatrixXd::Zero(kDim, kDim);
      for (int64_t p = -3; p < 37; ++p) {
        Eigen::MatrixXd turn = Eigen::MatrixXd::Identity(kDim, kDim);
        for (uint32_t j = 0; j < rotary_dim / 2; ++j) {
          const bool neox = pairing == RopePairing::kNeox;
          const Eigen::Index a = neox ? j : 2 * j;
          const Eigen::Index b = neox ? j + rotary_dim / 2 : 2 * j + 1;
          const double angle = static_cast<double>(p) * stages::RopeFrequency(rope, j);
          turn(a, a) = turn(b, b) = std::cos(angle);
          turn(a, b) = -std::sin(angle);
          turn(b, a) = std::sin(angle);
        }
        expected += turn.transpose() * moment * turn / 40;
      }
      Eigen::MatrixXd mean = moment;  // symmetric: either order of storage
      AverageOverTurns(rope, kDim, -3, 40, mean.data());
      EXPECT_LT((mean - expected).cwiseAbs().maxCoeff(), 1e-12) << rotary_dim;
    }
  }
}

TEST(Calibration, MetricIsTheRootOfTheMoment) {
  const Eigen::MatrixXd samples = Eigen::MatrixXd::Random(6, 3);
  const Eigen::MatrixXd moment = samples * samples.transpose();
  float gains[6];
  float vectors[36];
  MetricOfMoment(moment.data(), 6, 0.25, gains, vectors);
  Eigen::MatrixXd square = Eigen::MatrixXd::Zero(6, 6);
  for (int i = 0; i < 6; ++i) {
    const Eigen::VectorXd u = Eigen::Map<Eigen::VectorXf>(vectors + 6 * i, 6).cast<double>();
    square += static_cast<double>(gains[i] * gains[i]) * u * u.transpose();
  }
  const double mean = moment.trace() / 6;
  const Eigen::MatrixXd expected = (moment / mean + 0.25 * Eigen::MatrixXd::Identity(6, 6)) / 1.25;
  EXPECT_LT((square - expected).cwiseAbs().maxCoeff(), 1e-5);
  const Eigen::MatrixXd none = Eigen::MatrixXd::Zero(6, 6);
  MetricOfMoment(none.data(), 6, 0.25, gains, vectors);
  EXPECT_THAT(gains, ::testing::Each(1.0F));
}

}  // namespace
}  // namespace kvshrink
