// Rank and bits of the kvs family: how many components a block gets and how many bits each of their
// two factors (codec rule: the smallest rate-distortion cost; one component more as long as it
// lowers the cost of the whole block).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "kvshrink/shard.h"
#include "stages/codebook.h"

namespace kvshrink::stages {

inline constexpr int kRankCap = 12;
// Bits that a component costs beside its digits: two counts and a scale.
inline constexpr int kComponentOverheadBits = 16;

// What a component's bits count for and how many a block may have. An error of K moves the
// attention weights of all queries, one of V is averaged by them: K is worth more bits than V
// (measured on attention outputs at equal total).
struct RankPolicy {
  double price = 1;  // on the rate term
  int cap = kRankCap;
};

constexpr RankPolicy RankPolicyOf(Kind kind) {
  return kind == Kind::kKey ? RankPolicy{0.6, 12} : RankPolicy{1.1, 9};
}

struct FactorBits {
  int token = 0;    // x: bits per entry of the factor over tokens
  int channel = 0;  // y: bits per entry of the factor over channels
};

struct RankChoice {
  int rank = 0;
  std::array<FactorBits, kRankCap> bits{};
};

// lambda[0..count): squared singular values, descending. energy = ||X||_F^2. The block is n x d.
// With E the energy that is left before component i, J(x, y) = ln((E - lambda_i + min(1, D_x + D_y)
// lambda_i) / E) + price (2 ln 2 / (n d)) (x n + y d + overhead): the gain of the residual at a
// fixed rate against the component's bits, both in nats per entry and halved alike.
template <typename T>
RankChoice ChooseRank(const T* lambda, int count, T energy, int n, int d, RankPolicy policy) {
  RankChoice choice;
  T left = energy;
  const T price = static_cast<T>(policy.price) * T{2} * T(0.693147180559945309) /
                  (static_cast<T>(n) * static_cast<T>(d));
  for (int i = 0; i < std::min(count, policy.cap); ++i) {
    const T value = std::min(lambda[i], left);
    if (!(value > T{0})) {
      break;
    }
    T best = T{0};
    FactorBits best_bits;
    for (int x = kMinFactorBits; x <= kMaxFactorBits; ++x) {
      for (int y = std::max(kMinFactorBits, x - 1); y <= std::min(kMaxFactorBits, x + 2); ++y) {
        const T distortion =
            static_cast<T>(FactorCodebook(x).distortion + FactorCodebook(y).distortion);
        // A block of exact low rank leaves nothing: the ratio is kept off zero by the distortion
        // itself.
        const T ratio = (left - value + std::min(T{1}, distortion) * value) / left;
        const T cost =
            std::log(ratio) + price * static_cast<T>(x * n + y * d + kComponentOverheadBits);
        if (cost < best) {
          best = cost;
          best_bits = {x, y};
        }
      }
    }
    if (best_bits.token == 0) {
      break;
    }
    choice.bits[static_cast<size_t>(choice.rank++)] = best_bits;
    left -= value;
    if (!(left > T{0})) {
      break;
    }
  }
  return choice;
}

// What the choice leaves of the energy for the residual, by the rule's own estimate.
template <typename T>
T EnergyLeft(const RankChoice& choice, const T* lambda, T energy) {
  T left = energy;
  for (int i = 0; i < choice.rank; ++i) {
    const FactorBits& bits = choice.bits[static_cast<size_t>(i)];
    const T distortion = static_cast<T>(FactorCodebook(bits.token).distortion +
                                        FactorCodebook(bits.channel).distortion);
    left -= (T{1} - std::min(T{1}, distortion)) * lambda[i];
  }
  return std::max(T{0}, left);
}

}  // namespace kvshrink::stages
