// Calibrated bases for tests: of random metrics.
#pragma once

#include <Eigen/Dense>
#include <optional>
#include <random>
#include <vector>

#include "blocks.h"
#include "kvshrink/basis.h"
#include "kvshrink/calibration.h"

namespace kvshrink::testing {

// Random metrics whose gains span a factor of about 10.
inline BasisContents RandomBasis(uint32_t head_dim, uint32_t kv_heads,
                                 const std::vector<uint32_t>& layers,
                                 const std::optional<Rope>& rope = std::nullopt,
                                 uint32_t seed = 7) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  BasisContents contents;
  contents.model = "a model";
  contents.head_dim = head_dim;
  contents.kv_heads = kv_heads;
  contents.queries = 100;
  for (const uint32_t number : layers) {
    BasisLayer layer;
    layer.layer = number;
    layer.rope = rope;
    for (uint32_t head = 0; head < kv_heads; ++head) {
      const Eigen::MatrixXd samples = Eigen::MatrixXd::NullaryExpr(
          head_dim, 3, [&](Eigen::Index, Eigen::Index) { return normal(random); });
      const Eigen::MatrixXd moment = samples * samples.transpose();
      layer.gains.resize(size_t{head + 1} * head_dim);
      layer.vectors.resize(layer.gains.size() * head_dim);
      MetricOfMoment(moment.data(), head_dim, 0.5, layer.gains.data() + size_t{head} * head_dim,
                     layer.vectors.data() + size_t{head} * head_dim * head_dim);
    }
    contents.layers.push_back(std::move(layer));
  }
  return contents;
}

inline Basis MakeBasis(const BasisContents& contents) {
  return *Basis::Parse(WriteBasis(contents));
}

}  // namespace kvshrink::testing
