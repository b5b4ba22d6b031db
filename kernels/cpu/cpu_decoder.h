// Blocks back to numbers on a CPU.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "cpu/loops.h"
#include "cpu/trellis_loops.h"
#include "kvshrink/codec.h"
#include "stages/kvs_factors.h"

namespace kvshrink::cpu {

// Buffers are kept from block to block: one object per thread.
class CpuDecoder {
 public:
  // See Backend.
  absl::Status Unpack(Family family, const BlockView& block, uint32_t d, DecodeForm form,
                      Backend::UnpackedBlock* out);
  absl::Status Decode(Family family, const BlockView& block, uint32_t d, DecodeForm form,
                      float* rows);

 private:
  // Factors of the coded rows before the exponent.
  absl::Status ReadFactors(Family family, const BlockView& block, uint32_t d,
                           std::vector<float>* token, std::vector<float>* channel);
  // Rotated coded rows.
  absl::Status ReadResidual(Family family, const BlockView& block, uint32_t d, float* rows);
  static absl::Status ReadFp8(const BlockView& block, float* rows);

  const Loops& loops_ = ChooseLoops();
  const TrellisLoops& trellis_loops_ = ChooseTrellisLoops();
  uint32_t d_ = 0;
  std::vector<float> row_signs_;
  std::optional<stages::Rotation<float>> over_channels_, over_tokens_;
  std::vector<stages::KvsComponent> components_;
  std::vector<float> token_, channel_, column_, scales_;
  std::vector<uint8_t> digits_;
  std::vector<int8_t> levels_;
};

}  // namespace kvshrink::cpu
