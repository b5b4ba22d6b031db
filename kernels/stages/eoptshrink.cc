#include "stages/eoptshrink.h"

#include <Eigen/Dense>
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "stages/digits.h"
#include "stages/minifloat.h"

namespace kvshrink::stages {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Levels = std::array<float, 16>;

constexpr int kDigitBits = 4;
constexpr int kLloydRounds = 100;

// The number of eigenvalues taken as possibly signal.
int EdgeOffset(int p) {
  const double log_log = std::log(std::log(static_cast<double>(p)));
  const double exponent = log_log > 0 ? std::min(1 / 2.01, 1 / log_log) : 1 / 2.01;
  return static_cast<int>(std::floor(std::pow(static_cast<double>(p), exponent)));
}

// Eigenvalues of the noise: the top k are imputed along the edge's square-root law.
std::vector<double> NoiseEigenvalues(std::span<const double> lambda, int rank, int k) {
  const auto at = [&](int index) {
    return lambda[static_cast<size_t>(index - 1)];
  };  // 1-based, as in the paper
  const double step = (at(rank + k + 1) - at(rank + 2 * k + 1)) / (std::pow(2.0, 2.0 / 3.0) - 1);
  std::vector<double> noise;
  for (int j = 1; j <= k; ++j) {
    noise.push_back(at(rank + k + 1) +
                    (1 - std::pow(static_cast<double>(j) / k, 2.0 / 3.0)) * step);
  }
  noise.insert(noise.end(), lambda.begin() + rank + k, lambda.end());
  return noise;
}

double ShrinkOne(double z, std::span<const double> noise, double beta) {
  double m1 = 0;
  double m1_slope = 0;
  for (const double value : noise) {
    const double term = 1 / (value - z);
    m1 += term;
    m1_slope += term * term;
  }
  m1 /= static_cast<double>(noise.size());
  m1_slope /= static_cast<double>(noise.size());
  const double m2 = -(1 - beta) / z + beta * m1;
  const double m2_slope = (1 - beta) / (z * z) + beta * m1_slope;
  const double d_transform = z * m1 * m2;
  const double d_slope = m1 * m2 + z * m1_slope * m2 + z * m1 * m2_slope;
  const double strength = 1 / std::sqrt(d_transform);
  const double left = std::abs(m1 / (strength * strength * d_slope));
  const double right = std::abs(m2 / (strength * strength * d_slope));
  const double shrunk = strength * std::sqrt(left * right);
  return std::isfinite(shrunk) ? shrunk : std::sqrt(z);  // noise-free spectrum: nothing to shrink
}

// Lloyd-Max codebook of 16 levels for these values, in fp16 as stored.
Levels FitCodebook(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  std::vector<double> sums(values.size() + 1, 0.0);
  std::partial_sum(values.begin(), values.end(), sums.begin() + 1);
  std::array<double, 16> levels{};
  for (size_t i = 0; i < 16; ++i) {
    levels[i] = values[(2 * i + 1) * values.size() / 32];
  }
  for (int round = 0; round < kLloydRounds; ++round) {
    bool moved = false;
    size_t begin = 0;
    for (size_t i = 0; i < 16; ++i) {
      size_t end = values.size();
      if (i + 1 < 16) {
        end = static_cast<size_t>(
            std::upper_bound(values.begin(), values.end(), (levels[i] + levels[i + 1]) / 2) -
            values.begin());
      }
      if (end > begin) {
        const double mean = (sums[end] - sums[begin]) / static_cast<double>(end - begin);
        moved |= mean != levels[i];
        levels[i] = mean;
        begin = end;
      }
    }
    if (!moved) {
      break;
    }
  }
  Levels stored{};
  for (size_t i = 0; i < 16; ++i) {
    stored[i] = Fp16ToFloat(FloatToFp16(static_cast<float>(levels[i])));
  }
  return stored;
}

uint32_t NearestLevel(const Levels& levels, double value) {
  size_t best = 0;
  for (size_t i = 1; i < levels.size(); ++i) {
    if (std::abs(value - levels[i]) < std::abs(value - levels[best])) {
      best = i;
    }
  }
  return static_cast<uint32_t>(best);
}

void AppendFp16(float value, std::vector<uint8_t>* out) {
  const uint16_t bits = FloatToFp16(value);
  out->push_back(static_cast<uint8_t>(bits & 255));
  out->push_back(static_cast<uint8_t>(bits >> 8));
}

std::vector<uint8_t> WriteRecord(const Matrix& u, const Matrix& v, std::span<const double> phi) {
  const Levels u_levels = FitCodebook({u.data(), u.data() + u.size()});
  const Levels v_levels = FitCodebook({v.data(), v.data() + v.size()});
  std::vector<uint8_t> record;
  for (const double value : phi) {
    AppendFp16(static_cast<float>(value), &record);
  }
  for (const Levels* levels : {&u_levels, &v_levels}) {
    for (const float level : *levels) {
      AppendFp16(level, &record);
    }
  }
  BitWriter writer(&record);
  for (Eigen::Index i = 0; i < u.cols(); ++i) {
    for (Eigen::Index t = 0; t < u.rows(); ++t) {
      writer.Put(NearestLevel(u_levels, u(t, i)), kDigitBits);
    }
    for (Eigen::Index c = 0; c < v.rows(); ++c) {
      writer.Put(NearestLevel(v_levels, v(c, i)), kDigitBits);
    }
  }
  return record;
}

}  // namespace

ShrinkageResult OptimalShrinkage(std::span<const double> lambda, int q) {
  ShrinkageResult result;
  const int p = static_cast<int>(lambda.size());
  const int k = EdgeOffset(p);
  if (k < 1 || p < 2 * k + 2 || !(lambda[0] > 0)) {
    return result;  // too small a block for an edge estimate
  }
  const auto at = [&](int index) { return lambda[static_cast<size_t>(index - 1)]; };
  result.bulk_edge = at(k + 1) + (at(k + 1) - at(2 * k + 1)) / (std::pow(2.0, 2.0 / 3.0) - 1);
  const double threshold = std::pow(static_cast<double>(p), -1.0 / 3.0);
  while (result.rank < p - 2 * k - 1 && at(result.rank + 1) > result.bulk_edge * (1 + threshold)) {
    ++result.rank;
  }
  const std::vector<double> noise = NoiseEigenvalues(lambda, result.rank, k);
  const double beta = static_cast<double>(p) / q;
  for (int i = 1; i <= result.rank; ++i) {
    result.shrunk.push_back(ShrinkOne(at(i), noise, beta));
  }
  return result;
}

EOptShrinkFactors CodeEOptShrinkFactors(const double* x, int n, int d) {
  const Eigen::Map<const Matrix> block(x, n, d);
  const bool wide = n < d;
  const Matrix gram = wide ? Matrix(block * block.transpose()) : Matrix(block.transpose() * block);
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(gram);  // ascending
  const int p = std::min(n, d);
  std::vector<double> lambda(static_cast<size_t>(p));
  for (int i = 0; i < p; ++i) {
    lambda[static_cast<size_t>(i)] = std::max(0.0, solver.eigenvalues()(p - 1 - i));
  }
  const ShrinkageResult shrinkage = OptimalShrinkage(lambda, std::max(n, d));

  EOptShrinkFactors factors;
  factors.rank = shrinkage.rank;
  factors.low.assign(static_cast<size_t>(n) * static_cast<size_t>(d), 0.0);
  if (factors.rank == 0) {
    return factors;
  }
  Matrix small(p, factors.rank);
  for (int i = 0; i < factors.rank; ++i) {
    small.col(i) = solver.eigenvectors().col(p - 1 - i);
  }
  Matrix large = wide ? Matrix(block.transpose() * small) : Matrix(block * small);
  for (int i = 0; i < factors.rank; ++i) {
    large.col(i) /= std::sqrt(lambda[static_cast<size_t>(i)]);
  }
  const Matrix& u = wide ? small : large;
  const Matrix& v = wide ? large : small;
  const Eigen::Map<const Eigen::VectorXd> phi(shrinkage.shrunk.data(), factors.rank);
  Eigen::Map<Matrix>(factors.low.data(), n, d) = u * phi.asDiagonal() * v.transpose();
  factors.record = WriteRecord(u, v, shrinkage.shrunk);
  return factors;
}

bool ReadEOptShrinkFactors(std::span<const uint8_t> record, uint32_t rank, uint32_t n, uint32_t d,
                           std::vector<float>* token, std::vector<float>* channel) {
  token->assign(size_t{n} * rank, 0.0F);
  channel->assign(size_t{rank} * d, 0.0F);
  if (rank == 0) {
    return true;
  }
  bool finite = true;
  const auto fp16 = [&](size_t index) {
    const float value =
        Fp16ToFloat(static_cast<uint16_t>(record[2 * index] | (record[2 * index + 1] << 8)));
    finite &= std::isfinite(value);
    return value;
  };
  Levels u_levels{};
  Levels v_levels{};
  for (size_t i = 0; i < 16; ++i) {
    u_levels[i] = fp16(rank + i);
    v_levels[i] = fp16(rank + 16 + i);
  }
  BitReader reader(record.subspan(size_t{2} * rank + 64));
  for (uint32_t i = 0; i < rank; ++i) {
    const float phi = fp16(i);
    for (uint32_t t = 0; t < n; ++t) {
      (*token)[size_t{t} * rank + i] = phi * u_levels[reader.Get(kDigitBits)];
    }
    for (uint32_t c = 0; c < d; ++c) {
      (*channel)[size_t{i} * d + c] = v_levels[reader.Get(kDigitBits)];
    }
  }
  return finite;
}

}  // namespace kvshrink::stages
