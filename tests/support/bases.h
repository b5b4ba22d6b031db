// Calibrated bases for tests: of random metrics, and of real queries.
#pragma once

#include <Eigen/Dense>
#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "blocks.h"
#include "kvshrink/basis.h"

namespace kvshrink::testing {

// Appends the metric (S + eps tr(S)/d I)^(1/2), its gains of mean square 1, for one head.
inline void AppendMetric(const Eigen::MatrixXd& moment, double eps, BasisLayer* layer) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(moment);
  const Eigen::Index d = moment.rows();
  const double mean = moment.trace() / static_cast<double>(d);
  for (Eigen::Index i = 0; i < d; ++i) {
    const double value = std::max(0.0, solver.eigenvalues()(i)) / mean;
    layer->gains.push_back(static_cast<float>(std::sqrt((value + eps) / (1 + eps))));
  }
  for (Eigen::Index i = 0; i < d; ++i) {
    for (Eigen::Index c = 0; c < d; ++c) {
      layer->vectors.push_back(static_cast<float>(solver.eigenvectors()(c, i)));
    }
  }
}

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
      AppendMetric(samples * samples.transpose(), 0.5, &layer);
    }
    contents.layers.push_back(std::move(layer));
  }
  return contents;
}

inline Basis MakeBasis(const BasisContents& contents) {
  return *Basis::Parse(WriteBasis(contents));
}

}  // namespace kvshrink::testing
