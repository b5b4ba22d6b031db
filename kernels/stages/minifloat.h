// fp16, bf16 and fp8 e4m3 (OCP, no infinity) to fp32 and back: round to nearest even; finite values
// too large become the largest finite one.
#pragma once

#include <bit>
#include <cstdint>

#include "stages/portable.h"

namespace kvshrink::stages {

KVS_FN float Fp16ToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t body = static_cast<uint32_t>(half & 0x7FFFU) << 13;
  if (body >= (0x7C00U << 13)) {  // infinity, NaN
    return std::bit_cast<float>(sign | body | 0x7F800000U);
  }
  const float magnitude = std::bit_cast<float>(body) * 0x1p112F;  // exact also for denormals
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

KVS_FN uint16_t FloatToFp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t body = bits & 0x7FFFFFFFU;
  if (body > 0x7F800000U) {
    return static_cast<uint16_t>(sign | 0x7E00U | ((body >> 13) & 0x3FFU));
  }
  if (body == 0x7F800000U) {
    return static_cast<uint16_t>(sign | 0x7C00U);
  }
  if (body >= 0x477FF000U) {  // would round to 2^16
    return static_cast<uint16_t>(sign | 0x7BFFU);
  }
  if (body < 0x38800000U) {  // denormal: let the adder round
    const float shifted = std::bit_cast<float>(body) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000U));
  }
  const uint32_t rounded = body + 0xFFFU + ((body >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

KVS_FN float Bf16ToFloat(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

KVS_FN uint16_t FloatToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t body = bits & 0x7FFFFFFFU;
  if (body > 0x7F800000U) {
    return static_cast<uint16_t>((bits >> 16) | 0x40U);
  }
  if (body < 0x7F800000U && body >= 0x7F7F8000U) {
    return static_cast<uint16_t>(((bits >> 16) & 0x8000U) | 0x7F7FU);
  }
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

KVS_FN bool Fp8IsNan(uint8_t value) { return (value & 0x7FU) == 0x7FU; }

KVS_FN float Fp8ToFloat(uint8_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x80U) << 24;
  if (Fp8IsNan(value)) {
    return std::bit_cast<float>(sign | 0x7FC00000U);
  }
  const float magnitude =
      std::bit_cast<float>(static_cast<uint32_t>(value & 0x7FU) << 20) * 0x1p120F;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

KVS_FN uint8_t FloatToFp8(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80U;
  const uint32_t body = bits & 0x7FFFFFFFU;
  if (body > 0x7F800000U) {
    return static_cast<uint8_t>(sign | 0x7FU);
  }
  if (body >= 0x43E80000U) {  // 464 and more would round to 480, which is NaN's place
    return static_cast<uint8_t>(sign | 0x7EU);
  }
  if (body < 0x3C800000U) {  // below 2^-6: denormals are multiples of 2^-9
    const float shifted = std::bit_cast<float>(body) + 0x1p14F;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x46800000U));
  }
  const uint32_t rounded = body + 0x7FFFFU + ((body >> 20) & 1U);
  return static_cast<uint8_t>(sign | ((rounded - 0x3C000000U) >> 20));
}

}  // namespace kvshrink::stages
