#include "cpu/trellis_loops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/trellis_loops.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// Must come after it.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvshrink::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes: every count of states below is a whole number of vectors.
using Wide = hn::CappedTag<float, 16>;
using Floats = hn::Vec<Wide>;

// kSteps steps of one vector of branches at a time, so that its entries stay in registers. Not
// more: rows of metrics lie a power of two apart and would push each other out of the cache.
constexpr size_t kSteps = 16;

template <int kValues, int kMembers>
HWY_INLINE void MetricsOfSteps(const stages::TrellisBranches<float>& branches, const float* x,
                               float* metrics) {
  const Wide tag;
  constexpr size_t kWindows = size_t{stages::kTrellisStates} << kValues;
  for (size_t branch = 0; branch < kWindows; branch += hn::Lanes(tag)) {
    Floats half_energy[kMembers];
    Floats first[kMembers];
    Floats second[kMembers];
    for (size_t i = 0; i < kMembers; ++i) {
      const size_t entry = i * kWindows + branch;
      half_energy[i] = hn::LoadU(tag, branches.half_energy.data() + entry);
      first[i] = hn::LoadU(tag, branches.level[0].data() + entry);
      second[i] = kValues == 2 ? hn::LoadU(tag, branches.level[1].data() + entry) : hn::Zero(tag);
    }
    for (size_t step = 0; step < kSteps; ++step) {
      const auto x0 = hn::Set(tag, x[step * kValues]);
      const auto x1 = hn::Set(tag, x[step * kValues + kValues - 1]);
      const auto metric = [&](size_t i) {
        const auto one = hn::NegMulAdd(x0, first[i], half_energy[i]);
        return kValues == 2 ? hn::NegMulAdd(x1, second[i], one) : one;
      };
      auto best = metric(0);
      for (size_t i = 1; i < kMembers; ++i) {
        best = hn::Min(best, metric(i));
      }
      hn::StoreU(best, tag, metrics + step * kWindows + branch);
    }
  }
}

template <int kValues, int kMembers>
HWY_INLINE void MetricsOf(const stages::TrellisBranches<float>& branches, const float* x,
                          float* metrics) {
  for (const float* end = x + stages::kRunValues; x < end; x += kSteps * kValues) {
    MetricsOfSteps<kValues, kMembers>(branches, x, metrics);
    metrics += kSteps * (size_t{stages::kTrellisStates} << kValues);
  }
}

void Metrics(const stages::TrellisBranches<float>& branches, const float* x, float* metrics) {
  const stages::TrellisCode& code = branches.code;
  if (code.values == 2) {
    code.free_bits == 1 ? MetricsOf<2, 2>(branches, x, metrics)
                        : MetricsOf<2, 8>(branches, x, metrics);
  } else {
    code.free_bits == 1 ? MetricsOf<1, 2>(branches, x, metrics)
                        : MetricsOf<1, 4>(branches, x, metrics);
  }
}

// States that lead to next states q, q + 1, ... lie 2 (or 4) apart; their sums serve the next
// states q + 32 (or q + 16, q + 32, q + 48) as well.
HWY_INLINE void AdvanceSingles(const float* metrics, int steps, float* sums) {
  const Wide tag;
  constexpr size_t kStates = stages::kTrellisStates;
  for (int step = 0; step < steps; ++step, metrics += 2 * kStates, sums += kStates) {
    for (size_t q = 0; q < kStates / 2; q += hn::Lanes(tag)) {
      Floats from[2];
      hn::LoadInterleaved2(tag, sums + 2 * q, from[0], from[1]);
      for (size_t next = q; next < kStates; next += kStates / 2) {
        const auto a = hn::Add(from[0], hn::LoadU(tag, metrics + next));
        const auto b = hn::Add(from[1], hn::LoadU(tag, metrics + kStates + next));
        hn::StoreU(hn::Min(a, b), tag, sums + kStates + next);
      }
    }
  }
}

HWY_INLINE void AdvancePairs(const float* metrics, int steps, float* sums) {
  const Wide tag;
  constexpr size_t kStates = stages::kTrellisStates;
  for (int step = 0; step < steps; ++step, metrics += 4 * kStates, sums += kStates) {
    for (size_t q = 0; q < kStates / 4; q += hn::Lanes(tag)) {
      Floats from[4];
      hn::LoadInterleaved4(tag, sums + 4 * q, from[0], from[1], from[2], from[3]);
      for (size_t next = q; next < kStates; next += kStates / 4) {
        const auto a = hn::Add(from[0], hn::LoadU(tag, metrics + next));
        const auto b = hn::Add(from[1], hn::LoadU(tag, metrics + kStates + next));
        const auto c = hn::Add(from[2], hn::LoadU(tag, metrics + 2 * kStates + next));
        const auto d = hn::Add(from[3], hn::LoadU(tag, metrics + 3 * kStates + next));
        hn::StoreU(hn::Min(hn::Min(a, b), hn::Min(c, d)), tag, sums + kStates + next);
      }
    }
  }
}

void Advance(const stages::TrellisCode& code, const float* metrics, int steps, float* sums) {
  code.values == 2 ? AdvancePairs(metrics, steps, sums) : AdvanceSingles(metrics, steps, sums);
}

void Expand(const int8_t* levels, float scale, size_t d, float* row) {
  const float unit = scale * stages::kTrellisUnit;
  for (size_t c = 0; c < d; ++c) {
    row[c] = static_cast<float>(levels[c]) * unit;
  }
}

TrellisLoops MakeTrellisLoops() { return {Metrics, Advance, Expand}; }

}  // namespace HWY_NAMESPACE
}  // namespace kvshrink::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvshrink::cpu {

HWY_EXPORT(MakeTrellisLoops);

const TrellisLoops& ChooseTrellisLoops() {
  static const TrellisLoops loops = HWY_DYNAMIC_DISPATCH(MakeTrellisLoops)();
  return loops;
}

}  // namespace kvshrink::cpu
#endif
