// From the second moments of a head's queries to its metric.
#pragma once

#include <cstdint>

#include "kvshrink/rope.h"

namespace kvshrink {

inline constexpr double kDefaultCalibrationEps = 1;
inline constexpr double kMinCalibrationEps = 0.01;
inline constexpr double kMaxCalibrationEps = 100;

// moment (d x d, row-major, symmetric) = sum of q q^T of embedded queries becomes, in place, what
// keys before their embedding see of them: its mean over key positions p = first_position ..
// first_position + positions - 1 of R_p^T moment R_p. Exact, whatever their number; at least 1.
// rotary_dim is set.
void AverageOverTurns(const Rope& rope, uint32_t d, int64_t first_position, uint32_t positions,
                      double* moment);

// W = (S + eps tr(S)/d I)^(1/2) times a number that makes the mean of the squared gains 1: gains
// (d, ascending) and vectors (d x d, rows). Without queries (S = 0) W = I. eps within its limits
// keeps the gains within a basis's.
void MetricOfMoment(const double* moment, uint32_t d, double eps, float* gains, float* vectors);

}  // namespace kvshrink
