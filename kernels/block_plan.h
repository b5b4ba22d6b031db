// What was decided for a block ahead of its coding, where the bits of a whole shard are shared out.
#pragma once

#include "kvshrink/shard.h"
#include "stages/rank_rule.h"

namespace kvshrink {

struct BlockPlan {
  BlockCode code = BlockCode::kLevels3;
  stages::RankChoice choice;
};

}  // namespace kvshrink
