#include "rope_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace kvshrink {

using Turn = stages::Turn<double>;

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
  for (uint32_t j = 0; j < pairs_; ++j) {
    const double frequency = stages::RopeFrequency(rope, j);
    for (uint32_t b = 0; b < blocks; ++b) {
      const double angle = (first_position + double{kBlockTokens} * b) * frequency;
      store(&starts_, b, j, {std::cos(angle), std::sin(angle)});
    }
    // A power of the first step: its error stays far below that of a float.
    const Turn step = {std::cos(frequency), std::sin(frequency)};
    Turn turn = {1, 0};
    for (uint32_t t = 0; t < tokens; ++t) {
      store(&within_, t, j, turn);
      turn = stages::Compose(turn, step);
    }
  }
}

template <bool kInverse>
void RopeRows::TurnRow(const float* cosine, const float* sine, float* row) const {
  const uint32_t stride = pairing_ == RopePairing::kNeox ? pairs_ : 1;
  const uint32_t step = pairing_ == RopePairing::kNeox ? 1 : 2;
  for (uint32_t j = 0; j < pairs_; ++j) {
    const stages::Turn<float> turn = {cosine[j], kInverse ? -sine[j] : sine[j]};
    stages::TurnPair(turn, row + step * j, row + step * j + stride);
  }
}

template <bool kInverse>
void RopeRows::TurnRows(const BlockView& block, float* rows) const {
  const size_t start = size_t{block.first_row} / kBlockTokens * pairs_;
  std::array<float, kMaxHeadDim / 2> cosine;
  std::array<float, kMaxHeadDim / 2> sine;
  for (uint32_t t = block.raw_rows; t < block.rows; ++t) {
    const size_t within = size_t{t} * pairs_;
    for (uint32_t j = 0; j < pairs_; ++j) {
      const stages::Turn<float> turn =
          stages::Compose<float>({starts_.cosine[start + j], starts_.sine[start + j]},
                                 {within_.cosine[within + j], within_.sine[within + j]});
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
