#include "cpu/cpu_encoder.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

#include "cpu/rotation_signs.h"
#include "stages/eoptshrink.h"
#include "stages/exponent.h"

namespace kvshrink::cpu {
namespace {

constexpr double kDependent = 1e-12;  // as in the reference: the Gram matrix is in double
using Small = Eigen::Matrix<double, stages::kProbes, stages::kProbes, Eigen::RowMajor>;

// Made once per process.
const stages::TrellisBranches<float>& BranchesOf(const stages::TrellisCode& code) {
  static const std::array<stages::TrellisBranches<float>, std::size(stages::kTrellisCodes)> all = {
      stages::TrellisBranches<float>(stages::kTrellisCodes[0]),
      stages::TrellisBranches<float>(stages::kTrellisCodes[1]),
      stages::TrellisBranches<float>(stages::kTrellisCodes[2]),
      stages::TrellisBranches<float>(stages::kTrellisCodes[3])};
  return all[static_cast<size_t>(&code - stages::kTrellisCodes)];
}

}  // namespace

void CpuStages::SetShape(uint32_t n, uint32_t d) {
  if (d != d_) {
    d_ = d;
    row_signs_ = MakeSigns(stages::kRowSeed, d);
    over_channels_.emplace(stages::kChannelSeed, d);
    probes_.resize(size_t{d} * kPanel);
    for (uint32_t c = 0; c < d; ++c) {
      for (uint32_t j = 0; j < kPanel; ++j) {
        probes_[c * kPanel + j] = stages::ProbeEntry(j, c);
      }
    }
  }
  if (n != n_) {
    n_ = n;
    over_tokens_.emplace(stages::kTokenSeed, n);
  }
}

void CpuStages::Load(const Backend::BlockInput& in, int exponent) {
  SetShape(in.n, in.d);
  raw_rows_ = in.raw_rows;
  kind_ = in.kind;
  plan_ = in.plan;
  m_ = in.n - in.raw_rows;
  x_.assign(size_t{n_} * d_, 0.0F);
  const stages::PowerOfTwo down(-exponent);
  for (size_t i = size_t{raw_rows_} * d_; i < x_.size(); ++i) {
    x_[i] = down.Times(in.rows[i]);
  }
  energy_ = stages::SumOfSquares(x_.data(), x_.size());
  error_target_.clear();
}

void CpuStages::Orthonormalise() {
  Small gram;
  Small factor;
  loops_.gram(basis_.data(), basis_.data(), d_, gram.data());
  stages::OrthonormalisingFactor(gram.data(), kDependent, factor.data());
  const Eigen::Matrix<float, stages::kProbes, stages::kProbes, Eigen::RowMajor> narrow =
      factor.cast<float>();
  next_basis_.resize(basis_.size());
  loops_.multiply(basis_.data(), d_, kPanel, kPanel, 1, narrow.data(), next_basis_.data());
  basis_.swap(next_basis_);
}

void CpuStages::FindSubspace() {
  basis_ = probes_;
  projected_.resize(size_t{n_} * kPanel);
  for (int round = 0; round < stages::kSubspaceRounds; ++round) {
    loops_.multiply(x_.data(), n_, d_, d_, 1, basis_.data(), projected_.data());
    loops_.multiply(x_.data(), d_, n_, 1, d_, projected_.data(), basis_.data());
    Orthonormalise();
  }
  Orthonormalise();

  loops_.multiply(x_.data(), n_, d_, d_, 1, basis_.data(), projected_.data());
  Small small;
  loops_.gram(projected_.data(), projected_.data(), n_, small.data());
  const Eigen::SelfAdjointEigenSolver<Small> solver(small);  // ascending
  Eigen::Matrix<float, stages::kProbes, stages::kProbes, Eigen::RowMajor> turn;
  for (int i = 0; i < stages::kProbes; ++i) {
    lambda_[static_cast<size_t>(i)] = std::max(0.0, solver.eigenvalues()(stages::kProbes - 1 - i));
    turn.col(i) = solver.eigenvectors().col(stages::kProbes - 1 - i).cast<float>();
  }
  loops_.multiply(basis_.data(), d_, kPanel, kPanel, 1, turn.data(), next_basis_.data());
  basis_.swap(next_basis_);
}

void CpuStages::CodeChannelFactors(const stages::RankChoice& choice) {
  components_.resize(static_cast<size_t>(choice.rank));
  channel_.resize(components_.size() * d_);
  std::vector<float>& v = row_scales_;  // scratch of d
  v.resize(d_);
  for (size_t i = 0; i < components_.size(); ++i) {
    stages::KvsComponent& component = components_[i];
    component.bits = choice.bits[i];
    for (uint32_t c = 0; c < d_; ++c) {
      v[c] = basis_[c * kPanel + i];
    }
    stages::CodeChannelFactor(*over_channels_, component.bits.channel, v.data(),
                              &component.channel);
    stages::DecodeChannelFactor(*over_channels_, component.bits.channel, component.channel,
                                channel_.data() + i * d_);
  }
}

// A^T = (V V^T)^-1 V X^T, the rows of V being the channel factors as decoded.
void CpuStages::CodeTokenFactors(const stages::RankChoice& choice) {
  const auto rank = static_cast<size_t>(choice.rank);
  std::fill(basis_.begin(), basis_.end(), 0.0F);
  for (size_t i = 0; i < rank; ++i) {
    for (uint32_t c = 0; c < d_; ++c) {
      basis_[c * kPanel + i] = channel_[i * d_ + c];
    }
  }
  loops_.multiply(x_.data(), n_, d_, d_, 1, basis_.data(), projected_.data());
  Small wide_gram;
  loops_.gram(basis_.data(), basis_.data(), d_, wide_gram.data());
  Eigen::Matrix<float, stages::kProbes, stages::kProbes, Eigen::RowMajor> gram =
      wide_gram.cast<float>();
  token_.resize(rank * n_);
  for (size_t i = 0; i < rank; ++i) {
    for (uint32_t t = 0; t < n_; ++t) {
      token_[i * n_ + t] = projected_[t * kPanel + i];
    }
  }
  stages::SolveGram(gram.data(), choice.rank, stages::kProbes, token_.data(), n_, n_);
  for (size_t i = 0; i < rank; ++i) {
    stages::KvsComponent& component = components_[i];
    float* column = token_.data() + i * n_;
    component.scale =
        stages::CodeTokenFactor(*over_tokens_, component.bits.token, column, &component.token);
    stages::DecodeTokenFactor(*over_tokens_, component.bits.token, component.scale, component.token,
                              column);
  }
}

void CpuStages::CodeKvsFactors(const stages::RankChoice& choice, Backend::BlockOutput* out) {
  CodeChannelFactors(choice);
  CodeTokenFactors(choice);
  stages::WriteKvsFactors(components_, &out->factors);
  // Token factors by rows, as the loop reads them.
  for (size_t i = 0; i < components_.size(); ++i) {
    for (uint32_t t = 0; t < n_; ++t) {
      projected_[t * kPanel + i] = token_[i * n_ + t];
    }
  }
  loops_.add_low_rank(projected_.data(), kPanel, channel_.data(), components_.size(), -1.0F, n_, d_,
                      x_.data());
}

void CpuStages::CodeEOptShrink(Backend::BlockOutput* out) {
  const std::vector<double> wide(x_.begin(), x_.end());
  const stages::EOptShrinkFactors factors =
      stages::CodeEOptShrinkFactors(wide.data(), static_cast<int>(n_), static_cast<int>(d_));
  out->rank = static_cast<uint32_t>(factors.rank);
  out->factors = factors.record;
  stages::ReadEOptShrinkFactors(factors.record, out->rank, n_, d_, &token_, &channel_);
  error_target_ = x_;
  loops_.add_low_rank(token_.data(), out->rank, channel_.data(), out->rank, -1.0F, n_, d_,
                      error_target_.data());
  for (size_t i = 0; i < x_.size(); ++i) {
    x_[i] = static_cast<float>(wide[i] - factors.low[i]);
  }
}

void CpuStages::Rotate(std::vector<float>* rows) const {
  rows->erase(rows->begin(), rows->begin() + static_cast<std::ptrdiff_t>(size_t{raw_rows_} * d_));
  loops_.rotate(row_signs_.data(), m_, d_, rows->data());
}

std::vector<double> CpuStages::FindSpectrum() {
  FindSubspace();
  const size_t count = std::min({size_t{n_}, size_t{d_}, kPanel});
  return {lambda_.begin(), lambda_.begin() + static_cast<std::ptrdiff_t>(count)};
}

void CpuStages::CodeLowRank(Family family, Backend::BlockOutput* out) {
  if (family == Family::kKvs) {
    const std::vector<double> lambda = FindSpectrum();
    const stages::RankChoice choice =
        plan_ != nullptr ? plan_->choice
                         : stages::ChooseRank(lambda.data(), static_cast<int>(lambda.size()),
                                              energy_, static_cast<int>(n_), static_cast<int>(d_),
                                              stages::RankPolicyOf(kind_));
    out->rank = static_cast<uint32_t>(choice.rank);
    if (choice.rank > 0) {
      CodeKvsFactors(choice, out);
    }
  } else if (family == Family::kEOptShrinkQ) {
    CodeEOptShrink(out);
    Rotate(&error_target_);
  }
  coded_.swap(x_);
  Rotate(&coded_);
}

double CpuStages::CodeResidual(Family family, BlockCode code, std::vector<uint8_t>* scales,
                               std::vector<uint8_t>* codes) {
  row_scales_.resize(m_);
  for (uint32_t t = 0; t < m_; ++t) {
    const float energy = loops_.energy(coded_.data() + size_t{t} * d_, d_);
    row_scales_[t] = std::sqrt(energy / static_cast<float>(d_));
  }
  stages::WriteRowScales<float>(family, d_, row_scales_, scales);
  const stages::TrellisCode* trellis = stages::TrellisOf(code);
  return trellis != nullptr ? CodeTrellis(*trellis, codes) : CodeDigits(code, codes);
}

double CpuStages::CodeDigits(BlockCode code, std::vector<uint8_t>* codes) {
  const stages::Codebook& codebook = *stages::CodebookOf(code);
  digits_.resize(size_t{m_} * d_);
  sums_.resize(m_);
  double error = 0;
  for (uint32_t t = 0; t < m_; ++t) {
    const float* row = coded_.data() + size_t{t} * d_;
    uint8_t* digits = digits_.data() + size_t{t} * d_;
    const float inverse = row_scales_[t] > 0 ? 1 / row_scales_[t] : 0.0F;
    loops_.quantise(codebook, inverse, row, d_, digits, &sums_[t]);
    if (!error_target_.empty()) {
      const float* target = error_target_.data() + size_t{t} * d_;
      sums_[t].energy = loops_.energy(target, d_);
      sums_[t].product = loops_.level_product(codebook, digits, target, d_);
    }
    error += sums_[t].Error(static_cast<double>(row_scales_[t]));
  }
  stages::PackDigits(code, digits_, codes);
  return error;
}

double CpuStages::CodeTrellis(const stages::TrellisCode& code, std::vector<uint8_t>* codes) {
  const size_t padded = stages::RunsOf(size_t{m_} * d_) * stages::kRunValues;
  normal_.assign(padded, 0.0F);
  levels_.resize(padded);
  for (uint32_t t = 0; t < m_; ++t) {
    const float inverse = row_scales_[t] > 0 ? 1 / row_scales_[t] : 0.0F;
    for (size_t i = size_t{t} * d_; i < size_t{t + 1} * d_; ++i) {
      normal_[i] = coded_[i] * inverse;
    }
  }
  if (trellis_scratch_ == nullptr) {
    trellis_scratch_ = std::make_unique<stages::TrellisScratch<float>>();
  }
  stages::CodeTrellisRuns<float>(BranchesOf(code), normal_, trellis_loops_, trellis_scratch_.get(),
                                 levels_.data(), codes);
  double error = 0;
  for (uint32_t t = 0; t < m_; ++t) {
    const size_t start = size_t{t} * d_;
    float* difference = normal_.data() + start;
    trellis_loops_.expand(levels_.data() + start, row_scales_[t], d_, difference);
    for (size_t c = 0; c < d_; ++c) {
      difference[c] -= coded_[start + c];
    }
    error += static_cast<double>(loops_.energy(difference, d_));
  }
  return error;
}

}  // namespace kvshrink::cpu
