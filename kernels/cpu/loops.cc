#include "cpu/loops.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/loops.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// Must come after it.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvshrink::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes, so that a panel of 16 columns is a whole number of vectors.
using Wide = hn::CappedTag<float, 16>;
constexpr size_t kPartialSums = 16;

// Rows of the output that one pass keeps in registers.
template <size_t kRows>
HWY_INLINE void MultiplyRows(const float* m, size_t inner, size_t row_stride, size_t column_stride,
                             const float* b, float* c) {
  const Wide tag;
  const size_t lanes = hn::Lanes(tag);
  for (size_t column = 0; column < kPanel; column += 2 * lanes) {
    const bool two = column + lanes < kPanel;
    hn::Vec<Wide> low[kRows];
    hn::Vec<Wide> high[kRows];
    for (size_t i = 0; i < kRows; ++i) {
      low[i] = hn::Zero(tag);
      high[i] = hn::Zero(tag);
    }
    for (size_t k = 0; k < inner; ++k) {
      const auto b_low = hn::LoadU(tag, b + k * kPanel + column);
      const auto b_high = two ? hn::LoadU(tag, b + k * kPanel + column + lanes) : b_low;
      for (size_t i = 0; i < kRows; ++i) {
        const auto value = hn::Set(tag, m[i * row_stride + k * column_stride]);
        low[i] = hn::MulAdd(value, b_low, low[i]);
        high[i] = two ? hn::MulAdd(value, b_high, high[i]) : high[i];
      }
    }
    for (size_t i = 0; i < kRows; ++i) {
      hn::StoreU(low[i], tag, c + i * kPanel + column);
      if (two) {
        hn::StoreU(high[i], tag, c + i * kPanel + column + lanes);
      }
    }
  }
}

void Multiply(const float* m, size_t rows, size_t inner, size_t row_stride, size_t column_stride,
              const float* b, float* c) {
  size_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    MultiplyRows<4>(m + i * row_stride, inner, row_stride, column_stride, b, c + i * kPanel);
  }
  for (; i < rows; ++i) {
    MultiplyRows<1>(m + i * row_stride, inner, row_stride, column_stride, b, c + i * kPanel);
  }
}

void Gram(const float* a, const float* b, size_t rows, double* c) {
  const hn::CappedTag<double, 8> tag;
  const hn::Rebind<float, decltype(tag)> narrow;
  const size_t lanes = hn::Lanes(tag);
  for (size_t i = 0; i < kPanel; ++i) {
    for (size_t column = 0; column < kPanel; column += lanes) {
      auto sum = hn::Zero(tag);
      for (size_t k = 0; k < rows; ++k) {
        const auto value = hn::Set(tag, static_cast<double>(a[k * kPanel + i]));
        sum =
            hn::MulAdd(value, hn::PromoteTo(tag, hn::LoadU(narrow, b + k * kPanel + column)), sum);
      }
      hn::StoreU(sum, tag, c + i * kPanel + column);
    }
  }
}

// y += factor * x
HWY_INLINE void AddScaled(float factor, const float* x, size_t count, float* y) {
  const Wide tag;
  const size_t lanes = hn::Lanes(tag);
  const auto wide_factor = hn::Set(tag, factor);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(hn::MulAdd(wide_factor, hn::LoadU(tag, x + i), hn::LoadU(tag, y + i)), tag, y + i);
  }
  const hn::CappedTag<float, 1> one;
  for (; i < count; ++i) {
    hn::StoreU(hn::MulAdd(hn::Set(one, factor), hn::LoadU(one, x + i), hn::LoadU(one, y + i)), one,
               y + i);
  }
}

void AddLowRank(const float* token, size_t token_stride, const float* channel, size_t rank,
                float sign, size_t rows, size_t d, float* y) {
  for (size_t t = 0; t < rows; ++t) {
    for (size_t i = 0; i < rank; ++i) {
      AddScaled(sign * token[t * token_stride + i], channel + i * d, d, y + t * d);
    }
  }
}

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE void Butterflies(float* x, size_t length) { stages::WalshHadamard(x, length, 1, 1); }
#else
// One stage of the transform on vectors that lie whole in each half.
template <class Tag>
HWY_INLINE void WideStage(Tag tag, float* x, size_t length, size_t half) {
  const size_t lanes = hn::Lanes(tag);
  for (size_t start = 0; start < length; start += 2 * half) {
    for (size_t i = start; i < start + half; i += lanes) {
      const auto a = hn::LoadU(tag, x + i);
      const auto b = hn::LoadU(tag, x + i + half);
      hn::StoreU(hn::Add(a, b), tag, x + i);
      hn::StoreU(hn::Sub(a, b), tag, x + i + half);
    }
  }
}

// Stages 1 and 2 inside each group of four: sums in the lower places, differences in the upper.
HWY_INLINE void GroupStages(float* x, size_t length) {
  const hn::CappedTag<float, 4> tag;
  alignas(16) static constexpr float kOdd[4] = {1, -1, 1, -1};
  alignas(16) static constexpr float kUpper[4] = {1, 1, -1, -1};
  const auto odd = hn::Load(tag, kOdd);
  const auto upper = hn::Load(tag, kUpper);
  for (size_t i = 0; i < length; i += 4) {
    auto v = hn::LoadU(tag, x + i);
    v = hn::MulAdd(v, odd, hn::Shuffle2301(v));
    v = hn::MulAdd(v, upper, hn::Shuffle1032(v));
    hn::StoreU(v, tag, x + i);
  }
}

HWY_INLINE void Butterflies(float* x, size_t length) {
  if (length < 4) {
    stages::WalshHadamard(x, length, 1, 1);
    return;
  }
  GroupStages(x, length);
  const Wide wide;
  for (size_t half = 4; half < length; half *= 2) {
    if (half >= hn::Lanes(wide)) {
      WideStage(wide, x, length, half);
    } else {
      WideStage(hn::CappedTag<float, 4>(), x, length, half);
    }
  }
}
#endif

HWY_INLINE void ApplySigns(const float* signs, size_t length, float* x) {
  for (size_t i = 0; i < length; ++i) {
    x[i] *= signs[i];
  }
}

void Rotate(const float* signs, size_t rows, size_t d, float* y) {
  const size_t power = stages::LargestPowerOfTwo(static_cast<uint32_t>(d));
  for (float* row = y; row < y + rows * d; row += d) {
    ApplySigns(signs, power, row);
    Butterflies(row, power);
    if (power < d) {
      ApplySigns(signs + power, power, row + d - power);
      Butterflies(row + d - power, power);
    }
  }
}

void RotateInverse(const float* signs, size_t rows, size_t d, float* y) {
  const size_t power = stages::LargestPowerOfTwo(static_cast<uint32_t>(d));
  for (float* row = y; row < y + rows * d; row += d) {
    if (power < d) {
      Butterflies(row + d - power, power);
      ApplySigns(signs + power, power, row + d - power);
    }
    Butterflies(row, power);
    ApplySigns(signs, power, row);
  }
}

// Partial sums, lane by lane; the tail of a row is the start of one more round.
struct Sums16 {
  float part[kPartialSums] = {};

  float Total() const {
    float total = 0;
    for (const float value : part) {
      total += value;
    }
    return total;
  }
};

// part[i % 16] += a[i] * b[i]
HWY_INLINE float Dot(const float* a, const float* b, size_t count) {
  const Wide tag;
  const size_t lanes = hn::Lanes(tag);
  Sums16 sums;
  const size_t whole = count / kPartialSums * kPartialSums;
  for (size_t lane = 0; lane < kPartialSums && whole > 0; lane += lanes) {
    auto sum = hn::Zero(tag);
    for (size_t i = lane; i < whole; i += kPartialSums) {
      sum = hn::MulAdd(hn::LoadU(tag, a + i), hn::LoadU(tag, b + i), sum);
    }
    hn::StoreU(sum, tag, sums.part + lane);
  }
  const hn::CappedTag<float, 1> one;
  for (size_t i = whole; i < count; ++i) {
    float* part = sums.part + i % kPartialSums;
    hn::StoreU(hn::MulAdd(hn::LoadU(one, a + i), hn::LoadU(one, b + i), hn::LoadU(one, part)), one,
               part);
  }
  return sums.Total();
}

float Energy(const float* row, size_t d) { return Dot(row, row, d); }

void Expand(const stages::Codebook& codebook, const uint8_t* digits, float scale, size_t d,
            float* row) {
  float level[16];
  for (int i = 0; i < codebook.levels; ++i) {
    level[i] = codebook.level[i] * scale;
  }
  for (size_t c = 0; c < d; ++c) {
    row[c] = level[digits[c]];
  }
}

float LevelProduct(const stages::Codebook& codebook, const uint8_t* digits, const float* row,
                   size_t d) {
  float levels[kMaxHeadDim];
  Expand(codebook, digits, 1.0F, d, levels);
  return Dot(levels, row, d);
}

// Digits are counted in float lanes, one compare per threshold, then stored through a buffer.
void Quantise(const stages::Codebook& codebook, float inverse, const float* row, size_t d,
              uint8_t* digits, stages::RowSums<float>* sums) {
  const Wide tag;
  const size_t lanes = hn::Lanes(tag);
  const auto wide_inverse = hn::Set(tag, inverse);
  const auto one = hn::Set(tag, 1.0F);
  float counts[kMaxHeadDim + 16];
  float padded[kMaxHeadDim + 16];
  std::copy(row, row + d, padded);
  std::fill(padded + d, padded + d + 16, 0.0F);
  for (size_t c = 0; c < d; c += lanes) {
    const auto value = hn::Mul(hn::LoadU(tag, padded + c), wide_inverse);
    auto count = hn::Zero(tag);
    for (int i = 0; i + 1 < codebook.levels; ++i) {
      count = hn::Add(count,
                      hn::IfThenElseZero(hn::Gt(value, hn::Set(tag, codebook.threshold[i])), one));
    }
    hn::StoreU(count, tag, counts + c);
  }
  for (size_t c = 0; c < d; ++c) {
    digits[c] = static_cast<uint8_t>(static_cast<int>(counts[c]));
  }
  float levels[kMaxHeadDim];
  Expand(codebook, digits, 1.0F, d, levels);
  sums->energy = Dot(row, row, d);
  sums->level_energy = Dot(levels, levels, d);
  sums->product = Dot(levels, row, d);
}

Loops MakeLoops() {
  return {hwy::TargetName(HWY_TARGET),
          Multiply,
          Gram,
          AddLowRank,
          Rotate,
          RotateInverse,
          Quantise,
          Energy,
          LevelProduct,
          Expand};
}

}  // namespace HWY_NAMESPACE
}  // namespace kvshrink::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvshrink::cpu {

HWY_EXPORT(MakeLoops);

const Loops& ChooseLoops() {
  static const Loops loops = HWY_DYNAMIC_DISPATCH(MakeLoops)();
  return loops;
}

}  // namespace kvshrink::cpu
#endif
