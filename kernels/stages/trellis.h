// The trellis code of the residual (proto/FORMAT.md section 5.5). Values are coded in runs of 128:
// a run is a circular string of 128 coded bits, of which a step reads a window, and a string of
// free bits. Window and free bits of a step are the number of a table's entry.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvshrink/shard.h"
#include "stages/portable.h"
#include "stages/trellis_tables.h"

namespace kvshrink::stages {

inline constexpr int kRunValues = 128;
inline constexpr int kTrellisStateBits = 6;
inline constexpr int kTrellisStates = 1 << kTrellisStateBits;
inline constexpr float kTrellisUnit = 0x1p-5F;  // of the tables' numbers
inline constexpr int kRunCodedBytes = kRunValues / 8;

struct TrellisCode {
  int values;     // of a step, and the coded bits by which the window moves
  int free_bits;  // of a step
  const int8_t* table;
  double distortion;  // of N(0, 1), as the search leaves it

  constexpr int steps() const { return kRunValues / values; }
  constexpr int window_bits() const { return kTrellisStateBits + values; }
  constexpr int windows() const { return 1 << window_bits(); }
  constexpr int members() const { return 1 << free_bits; }
  constexpr int entries() const { return windows() * members(); }
  constexpr int run_bytes() const { return kRunCodedBytes + steps() * free_bits / 8; }
};

inline constexpr TrellisCode kTrellisCodes[] = {
    {2, 1, kTrellis32, 0.1441},
    {1, 1, kTrellis33, 0.0742},
    {2, 3, kTrellis34, 0.0371},
    {1, 2, kTrellis35, 0.0190},
};
inline constexpr int kMaxTrellisWindows = 256;
inline constexpr int kMaxTrellisRunBytes = 48;

// Null for codes that are no trellis.
constexpr const TrellisCode* TrellisOf(BlockCode code) {
  const int index = static_cast<int>(code) - static_cast<int>(BlockCode::kTrellis15);
  return index >= 0 && index < 4 ? &kTrellisCodes[index] : nullptr;
}

constexpr size_t RunsOf(size_t values) { return (values + kRunValues - 1) / kRunValues; }

// Bytes of `values` values.
constexpr size_t TrellisBytes(const TrellisCode& code, size_t values) {
  return RunsOf(values) * static_cast<size_t>(code.run_bytes());
}

// One run back to 128 levels, in units of 1/32. Any bytes are a run.
template <int kValues, int kFreeBits>
KVS_FN void ReadTrellisRun(const int8_t* table, const uint8_t* run, int8_t* levels) {
  // 16 values at a time: whole bytes of both strings.
  constexpr int kGroup = 16;
  constexpr int kSteps = kGroup / kValues;
  constexpr int kFreeBytes = kSteps * kFreeBits / 8;
  constexpr int kWindowBits = kTrellisStateBits + kValues;
  const uint8_t* free_bytes = run + kRunCodedBytes;
  for (int group = 0; group < kRunValues / kGroup; ++group) {
    const int next = (2 * group + 2) % kRunCodedBytes;
    uint32_t coded = run[2 * group] | uint32_t{run[2 * group + 1]} << 8 | uint32_t{run[next]} << 16;
    uint32_t free = 0;
    for (int i = 0; i < kFreeBytes; ++i) {
      free |= uint32_t{free_bytes[kFreeBytes * group + i]} << (8 * i);
    }
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t window = coded & ((1U << kWindowBits) - 1);
      const uint32_t entry = (free & ((1U << kFreeBits) - 1)) << kWindowBits | window;
      for (uint32_t i = 0; i < kValues; ++i) {
        *levels++ = table[entry * kValues + i];
      }
      coded >>= kValues;
      free >>= kFreeBits;
    }
  }
}

KVS_FN void ReadTrellisRun(const TrellisCode& code, const uint8_t* run, int8_t* levels) {
  if (code.values == 2) {
    code.free_bits == 1 ? ReadTrellisRun<2, 1>(code.table, run, levels)
                        : ReadTrellisRun<2, 3>(code.table, run, levels);
  } else {
    code.free_bits == 1 ? ReadTrellisRun<1, 1>(code.table, run, levels)
                        : ReadTrellisRun<1, 2>(code.table, run, levels);
  }
}

// TrellisBytes(code, values) bytes back to whole runs of levels, RunsOf(values) * 128 of them.
KVS_FN void ReadTrellisRuns(const TrellisCode& code, const uint8_t* bytes, size_t values,
                            int8_t* levels) {
  for (size_t run = 0; run < RunsOf(values); ++run) {
    ReadTrellisRun(code, bytes + run * static_cast<size_t>(code.run_bytes()),
                   levels + run * kRunValues);
  }
}

// Bytes of a run from the entries of its steps, whose windows follow each other around.
KVS_FN void WriteTrellisRun(const TrellisCode& code, const uint16_t* entries, uint8_t* run) {
  for (int i = 0; i < code.run_bytes(); ++i) {
    run[i] = 0;
  }
  for (int step = 0; step < code.steps(); ++step) {
    const int oldest = entries[step] & ((1 << code.values) - 1);
    const int coded_at = step * code.values;
    run[coded_at / 8] = static_cast<uint8_t>(run[coded_at / 8] | oldest << coded_at % 8);
    const int member = entries[step] >> code.window_bits();
    for (int i = 0; i < code.free_bits; ++i) {
      const int free_at = step * code.free_bits + i;
      uint8_t& byte = run[kRunCodedBytes + free_at / 8];
      byte = static_cast<uint8_t>(byte | (member >> i & 1) << free_at % 8);
    }
  }
}

}  // namespace kvshrink::stages
