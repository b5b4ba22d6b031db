// Where K is coded: rows turned back by the rotary embedding, then weighed by the metric of a
// calibrated basis, each where the shard has it; and the way back. V is coded as it is.
#pragma once

#include <cstdint>
#include <optional>

#include "kvshrink/basis.h"
#include "kvshrink/shard.h"
#include "rope_rows.h"

namespace kvshrink {

class KeySpace {
 public:
  // `header.extensions` say what there is; `basis` has passed CheckBasisOf and outlives this.
  KeySpace(const ShardHeader& header, const Basis* basis);

  bool has_rope() const { return rope_.has_value(); }
  bool weighs() const { return basis_ != nullptr; }

  // `rows`: the coded rows of the block (of K), row-major [coded_rows, head_dim], in place. What is
  // beyond the largest finite float becomes that on the way back.
  void Enter(const BlockView& block, float* rows) const;
  void Leave(const BlockView& block, float* rows) const;

  // The parts of both. TurnBack is the first half of Enter.
  void TurnBack(const BlockView& block, float* rows) const;
  void Weigh(uint32_t head, uint32_t count, float* rows) const;
  // Also for queries: q.k = (W^-1 q).(W k).
  void Unweigh(uint32_t head, uint32_t count, float* rows) const;

 private:
  uint32_t head_dim_;
  uint32_t layer_;
  std::optional<RopeRows> rope_;
  const Basis* basis_;
};

}  // namespace kvshrink
