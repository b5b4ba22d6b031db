#include "kvshrink/calibration.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <vector>

#include "stages/rope.h"

namespace kvshrink {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Turn = stages::Turn<double>;

// Two channels that turn together; `frequency` 0: they don't turn.
struct Pair {
  Eigen::Index a, b;
  double frequency;
};

// The last pair's `b` may be d, a channel that isn't there.
std::vector<Pair> PairsOf(const Rope& rope, uint32_t d) {
  std::vector<Pair> pairs;
  const uint32_t half = rope.rotary_dim / 2;
  for (uint32_t j = 0; j < half; ++j) {
    const bool neox = rope.pairing == RopePairing::kNeox;
    pairs.push_back(
        {neox ? j : 2 * j, neox ? j + half : 2 * j + 1, stages::RopeFrequency(rope, j)});
  }
  for (uint32_t c = rope.rotary_dim; c < d; c += 2) {
    pairs.push_back({c, c + 1, 0});
  }
  return pairs;
}

// The mean of turns by p w, p = first .. first + count - 1: a geometric series.
Turn MeanTurn(double w, double first, double count) {
  const double half = std::sin(w / 2);
  const double length = std::abs(half) < 1e-12 ? 1 : std::sin(count * w / 2) / (count * half);
  const double angle = w * (first + (count - 1) / 2);
  return {length * std::cos(angle), length * std::sin(angle)};
}

}  // namespace

// A 2 x 2 block of the moment, of pairs that turn by x and y, is a turn and a reflection, each
// times a number: the first turns on by y - x, the second by -(x + y), so their means are those of
// turns.
void AverageOverTurns(const Rope& rope, uint32_t d, int64_t first_position, uint32_t positions,
                      double* moment) {
  const std::vector<Pair> pairs = PairsOf(rope, d);
  Matrix full = Matrix::Zero(d + 1, d + 1);
  full.topLeftCorner(d, d) = Eigen::Map<const Matrix>(moment, d, d);
  const auto first = static_cast<double>(first_position);
  for (const Pair& x : pairs) {
    for (const Pair& y : pairs) {
      double& aa = full(x.a, y.a);
      double& ab = full(x.a, y.b);
      double& ba = full(x.b, y.a);
      double& bb = full(x.b, y.b);
      const Turn t = MeanTurn(x.frequency - y.frequency, first, positions);
      const Turn r = MeanTurn(x.frequency + y.frequency, first, positions);
      const double p = (aa + bb) / 2;
      const double q = (ba - ab) / 2;
      const double u = (aa - bb) / 2;
      const double v = (ab + ba) / 2;
      // As complex numbers: (p + i q) e^(-i w t) and (u + i v) e^(-i w t).
      const double p2 = p * t.cosine + q * t.sine;
      const double q2 = q * t.cosine - p * t.sine;
      const double u2 = u * r.cosine + v * r.sine;
      const double v2 = v * r.cosine - u * r.sine;
      aa = p2 + u2;
      bb = p2 - u2;
      ba = q2 + v2;
      ab = v2 - q2;
    }
  }
  Eigen::Map<Matrix>(moment, d, d) = full.topLeftCorner(d, d);
}

void MetricOfMoment(const double* moment, uint32_t d, double eps, float* gains, float* vectors) {
  const Eigen::Map<const Matrix> full(moment, d, d);
  const Matrix symmetric = (full + full.transpose()) / 2;
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(symmetric);
  const double mean = symmetric.trace() / d;
  for (uint32_t i = 0; i < d; ++i) {
    const double share = mean > 0 ? std::max(0.0, solver.eigenvalues()(i)) / mean : 1;
    gains[i] = static_cast<float>(std::sqrt((share + eps) / (1 + eps)));
    for (uint32_t c = 0; c < d; ++c) {
      vectors[size_t{i} * d + c] = static_cast<float>(solver.eigenvectors()(c, i));
    }
  }
}

}  // namespace kvshrink
