#include "kvshrink/client/values.h"

#include <bit>
#include <cstdint>
#include <cstring>

namespace kvshrink::client {
namespace {

// An IEEE-like code of `kExponentBits` and `kMantissaBits`, without its rules for the largest
// exponent: moved to where a float has these bits, then scaled by the difference of the exponent
// biases. Exact, also for denormals.
template <int kExponentBits, int kMantissaBits>
float Widen(uint32_t code) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  const uint32_t sign = (code >> (kExponentBits + kMantissaBits)) << 31;
  const uint32_t body = (code & ((1U << (kExponentBits + kMantissaBits)) - 1))
                        << (23 - kMantissaBits);
  constexpr float kScale = std::bit_cast<float>(static_cast<uint32_t>(127 + 127 - kBias) << 23);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(body) * kScale));
}

float FromFp16(uint16_t code) {
  if ((code & 0x7C00U) == 0x7C00U) {  // infinity, NaN
    const uint32_t sign = static_cast<uint32_t>(code & 0x8000U) << 16;
    return std::bit_cast<float>(sign | 0x7F800000U | static_cast<uint32_t>(code & 0x3FFU) << 13);
  }
  return Widen<5, 10>(code);
}

float FromFp8(uint8_t code) {
  if ((code & 0x7FU) == 0x7FU) {
    return std::bit_cast<float>(static_cast<uint32_t>(code & 0x80U) << 24 | 0x7FC00000U);
  }
  return Widen<4, 3>(code);
}

template <typename Code, typename Convert>
void ConvertAll(const std::byte* data, size_t count, float* out, Convert convert) {
  for (size_t i = 0; i < count; ++i) {
    Code code;
    std::memcpy(&code, data + i * sizeof(Code), sizeof(Code));
    out[i] = convert(code);
  }
}

}  // namespace

void ToFloats(DType dtype, const std::byte* data, size_t count, float* out) {
  switch (dtype) {
    case DType::kFp32:
      std::memcpy(out, data, count * sizeof(float));
      return;
    case DType::kFp16:
      ConvertAll<uint16_t>(data, count, out, FromFp16);
      return;
    case DType::kBf16:
      ConvertAll<uint16_t>(data, count, out, [](uint16_t code) {
        return std::bit_cast<float>(static_cast<uint32_t>(code) << 16);
      });
      return;
    case DType::kFp8E4m3:
      ConvertAll<uint8_t>(data, count, out, FromFp8);
      return;
  }
}

std::vector<float> ToFloats(const ConstTensor& tensor) {
  const TensorShape& shape = tensor.shape;
  std::vector<float> floats(shape.entries());
  float* out = floats.data();
  for (uint32_t token = 0; token < shape.tokens; ++token) {
    for (uint32_t head = 0; head < shape.kv_heads; ++head, out += shape.head_dim) {
      const uint64_t offset = tensor.layout.Offset(token, head) * DTypeBytes(tensor.dtype);
      ToFloats(tensor.dtype, tensor.data + offset, shape.head_dim, out);
    }
  }
  return floats;
}

}  // namespace kvshrink::client
