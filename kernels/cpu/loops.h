// The SIMD loops of the CPU backend, compiled for several instruction sets and chosen once per
// process. Row-major matrices throughout. Sums are taken in an order that doesn't depend on the
// vector length (16 partial sums, or one per output), so that processors with fused multiply-add
// give the same bytes whatever their vector width.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stages/codebook.h"
#include "stages/row_scales.h"
#include "stages/subspace.h"

namespace kvshrink::cpu {

inline constexpr size_t kPanel = stages::kProbes;  // columns of the narrow matrices

struct Loops {
  const char* target;  // name of the instruction set

  // c (rows x 16) = M b, where b is inner x 16 and M(i, k) = m[i * row_stride + k * column_stride].
  void (*multiply)(const float* m, size_t rows, size_t inner, size_t row_stride,
                   size_t column_stride, const float* b, float* c);
  // c (16 x 16) = a^T b in double, a and b being rows x 16.
  void (*gram)(const float* a, const float* b, size_t rows, double* c);
  // y[t] += sign * sum_{i < rank} token[t * token_stride + i] channel[i], for `rows` rows of d.
  void (*add_low_rank)(const float* token, size_t token_stride, const float* channel, size_t rank,
                       float sign, size_t rows, size_t d, float* y);
  // Rotates `rows` rows of d in place; `signs` as MakeSigns gives them.
  void (*rotate)(const float* signs, size_t rows, size_t d, float* y);
  void (*rotate_inverse)(const float* signs, size_t rows, size_t d, float* y);
  // Digits of one row times `inverse` and the sums over it.
  void (*quantise)(const stages::Codebook& codebook, float inverse, const float* row, size_t d,
                   uint8_t* digits, stages::RowSums<float>* sums);
  // Sum of squares of a row.
  float (*energy)(const float* row, size_t d);
  // Products with the levels of `digits`: sum row * level.
  float (*level_product)(const stages::Codebook& codebook, const uint8_t* digits, const float* row,
                         size_t d);
  // row[c] = level[digits[c]] * scale.
  void (*expand)(const stages::Codebook& codebook, const uint8_t* digits, float scale, size_t d,
                 float* row);
};

const Loops& ChooseLoops();

}  // namespace kvshrink::cpu
