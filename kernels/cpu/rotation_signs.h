// Signs of the row rotation as the loops take them.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "stages/rotate.h"

namespace kvshrink::cpu {

// 1 / sqrt(P) with the sign of each entry: those of the first pass, then, where there is one, those
// of the second.
inline std::vector<float> MakeSigns(stages::RotationSeed seed, uint32_t d) {
  const uint32_t power = stages::LargestPowerOfTwo(d);
  const float scale = 1.0F / std::sqrt(static_cast<float>(power));
  std::vector<float> signs;
  for (uint32_t j = 0; j < power; ++j) {
    signs.push_back(stages::SignIsNegative(seed, j) ? -scale : scale);
  }
  for (uint32_t j = d - power; power < d && j < d; ++j) {
    signs.push_back(stages::SignIsNegative(seed + 1, j) ? -scale : scale);
  }
  return signs;
}

}  // namespace kvshrink::cpu
