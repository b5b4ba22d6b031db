// The search for a run's code: a Viterbi search over the 64 states, twice around the circle. The
// loops that take the time, metrics and sums, are each backend's own; what must be found the same
// way is here.
//
// A branch is a window: it leads to the state of its upper six bits (`next`) and loses its oldest
// bits, the low ones (`lost`). Arrays over branches are ordered by (lost, next), so that vectors
// run over states.
#pragma once

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "stages/trellis.h"

namespace kvshrink::stages {

// A code's table as the search reads it: [member][lost][next].
template <typename T>
struct TrellisBranches {
  explicit TrellisBranches(const TrellisCode& the_code) : code(the_code) {
    const auto windows = static_cast<size_t>(code.windows());
    const auto entries = static_cast<size_t>(code.entries());
    const auto values = static_cast<size_t>(code.values);
    half_energy.resize(entries);
    for (size_t value = 0; value < values; ++value) {
      level[value].resize(entries);
    }
    for (size_t entry = 0; entry < entries; ++entry) {
      const size_t window = entry % windows;
      const size_t place =
          entry - window +
          Place(static_cast<int>(window >> values), Lost(static_cast<int>(window)));
      for (size_t value = 0; value < values; ++value) {
        const T number = static_cast<T>(code.table[entry * values + value]) * T{kTrellisUnit};
        level[value][place] = number;
        half_energy[place] += number * number / 2;
      }
    }
  }

  int Lost(int window) const { return window & ((1 << code.values) - 1); }
  static size_t Place(int next, int lost) {
    return static_cast<size_t>(lost * kTrellisStates + next);
  }

  TrellisCode code;
  std::vector<T> half_energy;  // |entry|^2 / 2
  std::vector<T> level[2];     // by value of a step
};

// Buffers of a search.
template <typename T>
struct TrellisScratch {
  // [step][lost][next]: least half_energy - <x, entry> over the members of a window. That, twice
  // and with |x|^2, is the squared error.
  T metrics[kRunValues * kMaxTrellisWindows / 2];
  // [step][state]: least sum of metrics on the way to a state.
  T sums[(kRunValues + 1) * kTrellisStates];
};

// The plain loops, for the reference.
template <typename T>
struct PlainTrellisLoops {
  // Fills the metrics of the 128 values x.
  static void Metrics(const TrellisBranches<T>& branches, const T* x, T* metrics) {
    const TrellisCode& code = branches.code;
    const auto windows = static_cast<size_t>(code.windows());
    for (int step = 0; step < code.steps(); ++step, x += code.values, metrics += windows) {
      std::fill(metrics, metrics + windows, std::numeric_limits<T>::infinity());
      for (size_t entry = 0; entry < branches.half_energy.size(); ++entry) {
        T metric = branches.half_energy[entry];
        for (int value = 0; value < code.values; ++value) {
          metric -= x[value] * branches.level[value][entry];
        }
        metrics[entry % windows] = std::min(metrics[entry % windows], metric);
      }
    }
  }

  // The sums after each of `steps` steps: sums holds those before the first and gets the others
  // behind them.
  static void Advance(const TrellisCode& code, const T* metrics, int steps, T* sums) {
    const int ways = 1 << code.values;
    for (int step = 0; step < steps; ++step, metrics += code.windows(), sums += kTrellisStates) {
      for (int next = 0; next < kTrellisStates; ++next) {
        T best = std::numeric_limits<T>::infinity();
        for (int lost = 0; lost < ways; ++lost) {
          const int state = (next << code.values | lost) % kTrellisStates;
          best = std::min(best, sums[state] + metrics[lost * kTrellisStates + next]);
        }
        sums[kTrellisStates + next] = best;
      }
    }
  }
};

// Follows the best path back from state `end` through `steps` steps of kValues values, whose
// metrics and sums are given. Writes the windows, returns the state where it starts. Ties go to the
// lower `lost`.
template <int kValues, typename T>
int TraceTrellis(const T* metrics, const T* sums, int steps, int end, uint16_t* windows) {
  constexpr int kWays = 1 << kValues;
  int state = end;
  for (int step = steps - 1; step >= 0; --step) {
    const T* metric = metrics + step * kWays * kTrellisStates + state;
    const T* sum = sums + step * kTrellisStates + (state * kWays) % kTrellisStates;
    T best = sum[0] + metric[0];
    int best_lost = 0;
    for (int lost = 1; lost < kWays; ++lost) {  // without a branch, which nothing could predict
      const T total = sum[lost] + metric[lost * kTrellisStates];
      best_lost = total < best ? lost : best_lost;
      best = std::min(best, total);
    }
    const int window = state * kWays + best_lost;
    windows[step] = static_cast<uint16_t>(window);
    state = window % kTrellisStates;
  }
  return state;
}

// The member of each step's window that is nearest to the values; ties go to the lower one.
template <typename T>
void ChooseMembers(const TrellisBranches<T>& branches, const T* x, uint16_t* entries) {
  const TrellisCode& code = branches.code;
  for (int step = 0; step < code.steps(); ++step, x += code.values) {
    const int window = entries[step];
    const size_t place = branches.Place(window >> code.values, branches.Lost(window));
    T least = std::numeric_limits<T>::infinity();
    int best_member = 0;
    for (int member = 0; member < code.members(); ++member) {
      const size_t entry = place + static_cast<size_t>(member * code.windows());
      T metric = branches.half_energy[entry] - x[0] * branches.level[0][entry];
      if (code.values == 2) {
        metric -= x[1] * branches.level[1][entry];
      }
      best_member = metric < least ? member : best_member;
      least = std::min(least, metric);
    }
    entries[step] = static_cast<uint16_t>(best_member * code.windows() + window);
  }
}

// Entries of the steps that code 128 values x. The state where the circle is closed comes from a
// search that starts and ends on the far side of it; 0.1% of the error is what that loses against
// trying all 64.
template <int kValues, typename T, typename Loops>
void SearchTrellisSteps(const TrellisBranches<T>& branches, const T* x, const Loops& loops,
                        TrellisScratch<T>* scratch, uint16_t* entries) {
  const TrellisCode& code = branches.code;
  const int half = code.steps() / 2;
  T* sums = scratch->sums;
  const T* first_half = scratch->metrics;
  const T* second_half = first_half + half * code.windows();
  loops.Metrics(branches, x, scratch->metrics);

  std::fill(sums, sums + kTrellisStates, T{0});
  loops.Advance(code, second_half, half, sums);
  T* middle = sums + half * kTrellisStates;
  loops.Advance(code, first_half, half, middle);
  const T* last = middle + half * kTrellisStates;
  const int far = static_cast<int>(std::min_element(last, last + kTrellisStates) - last);
  const int start = TraceTrellis<kValues>(first_half, middle, half, far, entries);

  constexpr T kNever = T{1e9};
  std::fill(sums, sums + kTrellisStates, kNever);
  sums[start] = T{0};
  loops.Advance(code, first_half, code.steps(), sums);
  TraceTrellis<kValues>(first_half, sums, code.steps(), start, entries);
  ChooseMembers(branches, x, entries);
}

template <typename T, typename Loops>
void SearchTrellisRun(const TrellisBranches<T>& branches, const T* x, const Loops& loops,
                      TrellisScratch<T>* scratch, uint16_t* entries) {
  branches.code.values == 2 ? SearchTrellisSteps<2>(branches, x, loops, scratch, entries)
                            : SearchTrellisSteps<1>(branches, x, loops, scratch, entries);
}

// Codes whole runs of 128 values of N(0, 1): appends their bytes, and writes the levels that a
// decoder reads from them (one per value, in units of 1/32).
template <typename T, typename Loops>
void CodeTrellisRuns(const TrellisBranches<T>& branches, std::span<const T> x, const Loops& loops,
                     TrellisScratch<T>* scratch, int8_t* levels, std::vector<uint8_t>* codes) {
  const auto run_bytes = static_cast<size_t>(branches.code.run_bytes());
  uint16_t entries[kRunValues];
  for (size_t start = 0; start < x.size(); start += kRunValues) {
    SearchTrellisRun(branches, x.data() + start, loops, scratch, entries);
    codes->resize(codes->size() + run_bytes);
    uint8_t* run = codes->data() + codes->size() - run_bytes;
    WriteTrellisRun(branches.code, entries, run);
    ReadTrellisRun(branches.code, run, levels + start);
  }
}

}  // namespace kvshrink::stages
