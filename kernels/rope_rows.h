// The rotary embedding on rows of K: undone before coding, redone after decoding.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvshrink/rope.h"
#include "kvshrink/shard.h"
#include "stages/rope.h"

namespace kvshrink {

// The turns of one shard's tokens: those of each block's first token, and those from there to each
// token of a block. Angles are taken in double; both turns are rounded to float and composed in it.
class RopeRows {
 public:
  // `header` has a rope.
  explicit RopeRows(const ShardHeader& header);

  // `rows`: the coded rows of the block (of K), row-major [coded_rows, head_dim], in place.
  void Undo(const BlockView& block, float* rows) const { TurnRows<true>(block, rows); }
  // What is beyond the largest finite float becomes that.
  void Redo(const BlockView& block, float* rows) const;

 private:
  // Turns of `count` tokens from an angle on, pair by pair: [count, pairs].
  struct Turns {
    std::vector<float> cosine, sine;
  };
  template <bool kInverse>
  void TurnRows(const BlockView& block, float* rows) const;
  template <bool kInverse>
  void TurnRow(const float* cosine, const float* sine, float* row) const;

  uint32_t head_dim_;
  uint32_t pairs_;
  RopePairing pairing_;
  Turns starts_;  // of the blocks
  Turns within_;  // of a block's tokens, from its first
};

// None when the shard's K is coded as it is.
std::optional<RopeRows> RopeRowsOf(const ShardHeader& header);

}  // namespace kvshrink
