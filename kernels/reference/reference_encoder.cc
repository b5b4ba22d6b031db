#include "reference/reference_encoder.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "stages/eoptshrink.h"
#include "stages/kvs_factors.h"
#include "stages/row_scales.h"
#include "stages/subspace.h"
#include "stages/trellis_search.h"

namespace kvshrink::reference {

using stages::KvsComponent;

namespace {

// What is left of a column that the others span is rounding, a few units in the last place of its
// length.
constexpr double kDependent = 1e-12;

Matrix Orthonormalised(const Matrix& columns) {
  const Matrix gram = columns.transpose() * columns;
  Matrix factor(stages::kProbes, stages::kProbes);
  stages::OrthonormalisingFactor(gram.data(), kDependent, factor.data());
  return columns * factor;
}

}  // namespace

void ReferenceStages::Load(const Backend::BlockInput& in, int exponent) {
  raw_rows_ = in.raw_rows;
  kind_ = in.kind;
  plan_ = in.plan;
  x_ = Matrix::Zero(in.n, in.d);
  for (uint32_t t = in.raw_rows; t < in.n; ++t) {
    for (uint32_t c = 0; c < in.d; ++c) {
      x_(t, c) = std::ldexp(static_cast<double>(in.rows[size_t{t} * in.d + c]), -exponent);
    }
  }
}

ReferenceStages::Spectrum ReferenceStages::ExactEigenpairs() const {
  const Matrix gram = x_.transpose() * x_;
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(gram);  // ascending
  const Eigen::Index count =
      std::min<Eigen::Index>(stages::kRankCap, std::min(x_.rows(), x_.cols()));
  Spectrum spectrum;
  spectrum.vectors = Matrix(x_.cols(), count);
  for (Eigen::Index i = 0; i < count; ++i) {
    spectrum.values.push_back(std::max(0.0, solver.eigenvalues()(x_.cols() - 1 - i)));
    spectrum.vectors.col(i) = solver.eigenvectors().col(x_.cols() - 1 - i);
  }
  return spectrum;
}

ReferenceStages::Spectrum ReferenceStages::LeadingEigenpairs() const {
  if (exact_) {
    return ExactEigenpairs();
  }
  const Eigen::Index d = x_.cols();
  Matrix basis(d, stages::kProbes);
  for (int j = 0; j < stages::kProbes; ++j) {
    for (Eigen::Index c = 0; c < d; ++c) {
      basis(c, j) = static_cast<double>(
          stages::ProbeEntry(static_cast<uint32_t>(j), static_cast<uint32_t>(c)));
    }
  }
  for (int round = 0; round < stages::kSubspaceRounds; ++round) {
    basis = Orthonormalised(x_.transpose() * (x_ * basis));
  }
  basis = Orthonormalised(basis);

  const Matrix projected = x_ * basis;
  const Matrix small = projected.transpose() * projected;
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(small);
  const Eigen::Index count =
      std::min<Eigen::Index>(stages::kRankCap, std::min(x_.rows(), x_.cols()));
  Spectrum spectrum;
  spectrum.vectors = Matrix(d, count);
  for (Eigen::Index i = 0; i < count; ++i) {
    const Eigen::Index place = stages::kProbes - 1 - i;
    spectrum.values.push_back(std::max(0.0, solver.eigenvalues()(place)));
    spectrum.vectors.col(i) = basis * solver.eigenvectors().col(place);
  }
  return spectrum;
}

Matrix ReferenceStages::CodeKvsFactors(const Spectrum& spectrum, const stages::RankChoice& choice,
                                       Backend::BlockOutput* out) const {
  const auto n = static_cast<uint32_t>(x_.rows());
  const auto d = static_cast<uint32_t>(x_.cols());
  const stages::Rotation<double> over_channels(stages::kChannelSeed, d);
  const stages::Rotation<double> over_tokens(stages::kTokenSeed, n);
  std::vector<KvsComponent> components(static_cast<size_t>(choice.rank));
  Matrix channel(choice.rank, d);
  for (int i = 0; i < choice.rank; ++i) {
    KvsComponent& component = components[static_cast<size_t>(i)];
    component.bits = choice.bits[static_cast<size_t>(i)];
    std::vector<double> v(d);
    for (uint32_t c = 0; c < d; ++c) {
      v[c] = spectrum.vectors(c, i);
    }
    stages::CodeChannelFactor(over_channels, component.bits.channel, v.data(), &component.channel);
    stages::DecodeChannelFactor(over_channels, component.bits.channel, component.channel,
                                channel.row(i).data());
  }
  // A^T = (V V^T)^-1 V X^T, rows of `channel` being the channel factors as decoded.
  Matrix token = channel * x_.transpose();
  Matrix gram = channel * channel.transpose();
  stages::SolveGram(gram.data(), choice.rank, choice.rank, token.data(), n, n);
  for (int i = 0; i < choice.rank; ++i) {
    KvsComponent& component = components[static_cast<size_t>(i)];
    double* column = token.row(i).data();
    component.scale =
        stages::CodeTokenFactor(over_tokens, component.bits.token, column, &component.token);
    stages::DecodeTokenFactor(over_tokens, component.bits.token, component.scale, component.token,
                              column);
  }
  stages::WriteKvsFactors(components, &out->factors);
  return token.transpose() * channel;
}

void ReferenceStages::Rotate(Matrix* rows) const {
  const stages::Rotation<double> rotation(stages::kRowSeed, static_cast<uint32_t>(rows->cols()));
  for (Eigen::Index t = 0; t < rows->rows(); ++t) {
    rotation.Apply(rows->row(t).data());
  }
}

void ReferenceStages::CodeLowRank(Family family, Backend::BlockOutput* out) {
  const Eigen::Index m = x_.rows() - raw_rows_;
  const auto n = static_cast<uint32_t>(x_.rows());
  const auto d = static_cast<uint32_t>(x_.cols());
  if (family == Family::kKvs) {
    const Spectrum spectrum = LeadingEigenpairs();
    const stages::RankChoice choice =
        plan_ != nullptr
            ? plan_->choice
            : stages::ChooseRank(spectrum.values.data(), static_cast<int>(spectrum.values.size()),
                                 energy(), static_cast<int>(n), static_cast<int>(d),
                                 stages::RankPolicyOf(kind_));
    out->rank = static_cast<uint32_t>(choice.rank);
    const Matrix low = choice.rank > 0 ? CodeKvsFactors(spectrum, choice, out) : Matrix::Zero(n, d);
    residual_ = (x_ - low).bottomRows(m);
    error_target_ = residual_;
  } else if (family == Family::kEOptShrinkQ) {
    const stages::EOptShrinkFactors factors =
        stages::CodeEOptShrinkFactors(x_.data(), static_cast<int>(n), static_cast<int>(d));
    out->rank = static_cast<uint32_t>(factors.rank);
    out->factors = factors.record;
    std::vector<float> token;
    std::vector<float> channel;
    stages::ReadEOptShrinkFactors(factors.record, out->rank, n, d, &token, &channel);
    const Eigen::Map<const Eigen::Matrix<float, -1, -1, Eigen::RowMajor>> u(token.data(), n,
                                                                            out->rank);
    const Eigen::Map<const Eigen::Matrix<float, -1, -1, Eigen::RowMajor>> v(channel.data(),
                                                                            out->rank, d);
    residual_ = (x_ - Eigen::Map<const Matrix>(factors.low.data(), n, d)).bottomRows(m);
    error_target_ = (x_ - u.cast<double>() * v.cast<double>()).bottomRows(m);
  } else {
    residual_ = x_.bottomRows(m);
    error_target_ = residual_;
  }
  Rotate(&residual_);
  Rotate(&error_target_);
}

double ReferenceStages::CodeResidual(Family family, BlockCode code, std::vector<uint8_t>* scales,
                                     std::vector<uint8_t>* codes) const {
  const auto d = static_cast<uint32_t>(residual_.cols());
  std::vector<double> row_scales;
  for (Eigen::Index t = 0; t < residual_.rows(); ++t) {
    row_scales.push_back(std::sqrt(residual_.row(t).squaredNorm() / d));
  }
  stages::WriteRowScales<double>(family, d, row_scales, scales);
  const stages::TrellisCode* trellis = stages::TrellisOf(code);
  return trellis != nullptr ? CodeTrellis(*trellis, row_scales, codes)
                            : CodeDigits(code, row_scales, codes);
}

double ReferenceStages::CodeDigits(BlockCode code, const std::vector<double>& row_scales,
                                   std::vector<uint8_t>* codes) const {
  const stages::Codebook& codebook = *stages::CodebookOf(code);
  const auto d = static_cast<uint32_t>(residual_.cols());
  std::vector<uint8_t> digits;
  double error = 0;
  for (Eigen::Index t = 0; t < residual_.rows(); ++t) {
    const double scale = row_scales[static_cast<size_t>(t)];
    stages::RowSums<double> sums;
    sums.energy = error_target_.row(t).squaredNorm();
    for (uint32_t c = 0; c < d; ++c) {
      const int digit = stages::NearestDigit(codebook, scale > 0 ? residual_(t, c) / scale : 0.0);
      digits.push_back(static_cast<uint8_t>(digit));
      const auto level = static_cast<double>(codebook.level[digit]);
      sums.level_energy += level * level;
      sums.product += level * error_target_(t, c);
    }
    error += sums.Error(scale);
  }
  stages::PackDigits(code, digits, codes);
  return error;
}

double ReferenceStages::CodeTrellis(const stages::TrellisCode& code,
                                    const std::vector<double>& row_scales,
                                    std::vector<uint8_t>* codes) const {
  const auto count = static_cast<size_t>(residual_.size());
  const auto d = static_cast<size_t>(residual_.cols());
  std::vector<double> x(stages::RunsOf(count) * stages::kRunValues);
  for (size_t i = 0; i < count; ++i) {
    const double scale = row_scales[i / d];
    x[i] = scale > 0 ? residual_.data()[i] / scale : 0;
  }
  std::vector<int8_t> levels(x.size());
  const auto scratch = std::make_unique<stages::TrellisScratch<double>>();
  stages::CodeTrellisRuns<double>(stages::TrellisBranches<double>(code), x,
                                  stages::PlainTrellisLoops<double>(), scratch.get(), levels.data(),
                                  codes);
  double error = 0;
  for (size_t i = 0; i < count; ++i) {
    const double level = double{stages::kTrellisUnit} * levels[i] * row_scales[i / d];
    error += (residual_.data()[i] - level) * (residual_.data()[i] - level);
  }
  return error;
}

}  // namespace kvshrink::reference
