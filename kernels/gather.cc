#include "gather.h"

#include <algorithm>
#include <cstring>

#include "stages/minifloat.h"

namespace kvshrink {
namespace {

template <typename Stored, float (*kConvert)(Stored)>
void ConvertFrom(const void* values, size_t count, float* floats) {
  const auto* bytes = static_cast<const std::byte*>(values);
  for (size_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, bytes + i * sizeof(Stored), sizeof(Stored));
    floats[i] = kConvert(value);
  }
}

template <typename Stored, Stored (*kConvert)(float)>
void ConvertTo(const float* floats, size_t count, std::byte* values) {
  for (size_t i = 0; i < count; ++i) {
    const Stored value = kConvert(floats[i]);
    std::memcpy(values + i * sizeof(Stored), &value, sizeof(Stored));
  }
}

void FromFloats(const float* floats, DType dtype, size_t count, std::byte* values) {
  switch (dtype) {
    case DType::kFp32:
      std::memcpy(values, floats, count * sizeof(float));
      return;
    case DType::kFp16:
      return ConvertTo<uint16_t, stages::FloatToFp16>(floats, count, values);
    case DType::kBf16:
      return ConvertTo<uint16_t, stages::FloatToBf16>(floats, count, values);
    case DType::kFp8E4m3:
      return ConvertTo<uint8_t, stages::FloatToFp8>(floats, count, values);
  }
}

template <typename Tensor>
auto* RowAt(const Tensor& tensor, const RowRange& range, uint32_t row) {
  return tensor.data +
         tensor.layout.Offset(range.first_row + row, range.head) * DTypeBytes(tensor.dtype);
}

}  // namespace

void ToFloats(const void* values, DType dtype, size_t count, float* floats) {
  switch (dtype) {
    case DType::kFp32:
      std::copy_n(static_cast<const std::byte*>(values), count * sizeof(float),
                  reinterpret_cast<std::byte*>(floats));
      return;
    case DType::kFp16:
      return ConvertFrom<uint16_t, stages::Fp16ToFloat>(values, count, floats);
    case DType::kBf16:
      return ConvertFrom<uint16_t, stages::Bf16ToFloat>(values, count, floats);
    case DType::kFp8E4m3:
      return ConvertFrom<uint8_t, stages::Fp8ToFloat>(values, count, floats);
  }
}

void GatherRows(const ConstTensor& tensor, const RowRange& range, float* rows) {
  const size_t d = tensor.shape.head_dim;
  for (uint32_t t = 0; t < range.count; ++t) {
    ToFloats(RowAt(tensor, range, t), tensor.dtype, d, rows + t * d);
  }
}

void AppendRowBytes(const ConstTensor& tensor, const RowRange& range, std::string* bytes) {
  const size_t row_bytes = tensor.shape.head_dim * DTypeBytes(tensor.dtype);
  for (uint32_t t = 0; t < range.count; ++t) {
    bytes->append(reinterpret_cast<const char*>(RowAt(tensor, range, t)), row_bytes);
  }
}

void ScatterRows(const float* rows, const RowRange& range, const MutableTensor& tensor) {
  const size_t d = tensor.shape.head_dim;
  for (uint32_t t = 0; t < range.count; ++t) {
    FromFloats(rows + t * d, tensor.dtype, d, RowAt(tensor, range, t));
  }
}

void ScatterRowBytes(std::span<const uint8_t> bytes, DType from, const RowRange& range,
                     const MutableTensor& tensor) {
  const size_t d = tensor.shape.head_dim;
  const size_t row_bytes = d * DTypeBytes(from);
  float row[kMaxHeadDim];
  for (uint32_t t = 0; t < range.count; ++t) {
    const uint8_t* source = bytes.data() + t * row_bytes;
    std::byte* target = RowAt(tensor, range, t);
    if (from == tensor.dtype) {
      std::memcpy(target, source, row_bytes);
    } else {
      ToFloats(source, from, d, row);
      FromFloats(row, tensor.dtype, d, target);
    }
  }
}

}  // namespace kvshrink
