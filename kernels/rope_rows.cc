#include "rope_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace kvshrink {

using Turn = stages::Turn<double>;

namespace {

constexpr size_t kMaxPairs = kMaxHeadDim / 2;

}  // namespace

RopeRows::RopeRows(const ShardHeader& header)
    : head_dim_(header.shape.head_dim),
      pairs_(header.extensions.rope->rotary_dim / 2),
      pairing_(header.extensions.rope->pairing) {
  const Rope& rope = *header.extensions.rope;
  const uint32_t blocks = header.blocks_per_head();
  const uint32_t tokens = std::min(kBlockTokens, header.shape.tokens);
  const double first_position =
      static_cast<double>(int64_t{header.first_token} + rope.position_offset);
  for (Turns* turns : {&starts_, &within_}) {
    const size_t count = size_t{turns == &starts_ ? blocks : tokens} * pairs_;
    turns->cosine.resize(count);
    turns->sine.resize(count);
  }
  const auto store = [&](Turns* turns, uint32_t row, uint32_t j, const Turn& turn) {
    turns->cosine[size_t{row} * pairs_ + j] = static_cast<float>(turn.cosine);
    turns->sine[size_t{row} * pairs_ + j] = static_cast<float>(turn.sine);
  };
  std::array<Turn, kMaxPairs> step;
  std::array<Turn, kMaxPairs> turn;
  for (uint32_t j = 0; j < pairs_; ++j) {
    const double frequency = stages::RopeFrequency(rope, j);
    for (uint32_t b = 0; b < blocks; ++b) {
      const double angle = (first_position + double{kBlockTokens} * b) * frequency;
      store(&starts_, b, j, {std::cos(angle), std::sin(angle)});
    }
    step[j] = {std::cos(frequency), std::sin(frequency)};
    turn[j] = {1, 0};
  }
  // Powers of a step: at most 127 products of doubles, far below what a float can tell.
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t j = 0; j < pairs_; ++j) {
      store(&within_, t, j, turn[j]);
      turn[j] = stages::Compose(turn[j], step[j]);
    }
  }
}

// Strides that are known at compile time make these loops vectors.
template <bool kInverse>
void RopeRows::TurnRow(const float* cosine, const float* sine, float* row) const {
  const auto turn = [&](uint32_t j, float* a, float* b) {
    stages::TurnPair<float>({cosine[j], kInverse ? -sine[j] : sine[j]}, a, b);
  };
  if (pairing_ == RopePairing::kNeox) {
    for (uint32_t j = 0; j < pairs_; ++j) {
      turn(j, row + j, row + pairs_ + j);
    }
  } else {
    for (uint32_t j = 0; j < pairs_; ++j) {
      turn(j, row + 2 * j, row + 2 * j + 1);
    }
  }
}

template <bool kInverse>
void RopeRows::TurnRows(const BlockView& block, float* rows) const {
  const float* start_cosine = starts_.cosine.data() + block.first_row / kBlockTokens * pairs_;
  const float* start_sine = starts_.sine.data() + block.first_row / kBlockTokens * pairs_;
  std::array<float, kMaxPairs> cosine;
  std::array<float, kMaxPairs> sine;
  for (uint32_t t = block.raw_rows; t < block.rows; ++t) {
    const float* token_cosine = within_.cosine.data() + size_t{t} * pairs_;
    const float* token_sine = within_.sine.data() + size_t{t} * pairs_;
    for (uint32_t j = 0; j < pairs_; ++j) {
      const auto turn = stages::Compose<float>({start_cosine[j], start_sine[j]},
                                               {token_cosine[j], token_sine[j]});
      cosine[j] = turn.cosine;
      sine[j] = turn.sine;
    }
    TurnRow<kInverse>(cosine.data(), sine.data(), rows);
    rows += head_dim_;
  }
}

void RopeRows::Redo(const BlockView& block, float* rows) const {
  TurnRows<false>(block, rows);
  constexpr float kLargest = std::numeric_limits<float>::max();
  const size_t count = size_t{block.coded_rows()} * head_dim_;
  for (size_t i = 0; i < count; ++i) {
    rows[i] = std::clamp(rows[i], -kLargest, kLargest);
  }
}

std::optional<RopeRows> RopeRowsOf(const ShardHeader& header) {
  return header.extensions.rope.has_value() ? std::optional<RopeRows>(header) : std::nullopt;
}

template void RopeRows::TurnRows<true>(const BlockView& block, float* rows) const;

}  // namespace kvshrink
