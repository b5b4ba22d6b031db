// Every layout and dtype in and out.
#include <gtest/gtest.h>

#include <cmath>

#include "blocks.h"
#include "stages/minifloat.h"

namespace kvshrink {
namespace {

using testing::OptionsOf;
using testing::Tensor;

std::vector<TensorLayout> Layouts(const TensorShape& shape) {
  TensorLayout padded = LayoutThd(shape);
  padded.head_stride += 5;
  padded.token_stride = padded.head_stride * shape.kv_heads + 3;
  return {LayoutThd(shape),      LayoutHtd(shape),        LayoutBnhd(shape, 16),
          LayoutBhnd(shape, 16), LayoutBhnd(shape, 1000), padded};
}

// A value that each dtype holds exactly.
float Small(size_t i) {
  return static_cast<float>(static_cast<int>(i * 2654435761U >> 28) - 8) / 8;
}

template <typename Store>
std::vector<std::byte> Fill(const TensorShape& shape, const TensorLayout& layout, DType dtype,
                            Store store) {
  std::vector<std::byte> bytes(*LayoutExtent(shape, layout) * DTypeBytes(dtype));
  for (uint32_t t = 0; t < shape.tokens; ++t) {
    for (uint32_t h = 0; h < shape.kv_heads; ++h) {
      for (uint32_t c = 0; c < shape.head_dim; ++c) {
        const float value = Small((size_t{t} * shape.kv_heads + h) * shape.head_dim + c);
        store(value, bytes.data() + (layout.Offset(t, h) + c) * DTypeBytes(dtype));
      }
    }
  }
  return bytes;
}

std::vector<std::byte> FillAs(const TensorShape& shape, const TensorLayout& layout, DType dtype) {
  return Fill(shape, layout, dtype, [dtype](float value, std::byte* out) {
    const uint16_t half =
        dtype == DType::kFp16 ? stages::FloatToFp16(value) : stages::FloatToBf16(value);
    const uint8_t eight = stages::FloatToFp8(value);
    if (dtype == DType::kFp32) {
      std::memcpy(out, &value, 4);
    } else if (dtype == DType::kFp8E4m3) {
      std::memcpy(out, &eight, 1);
    } else {
      std::memcpy(out, &half, 2);
    }
  });
}

TEST(Layouts, AnyLayoutAndDtypeInGivesTheSameCodes) {
  const TensorShape shape{150, 2, 24};
  const auto backend = MakeCpuBackend(2);
  for (const DType dtype : {DType::kFp32, DType::kFp16, DType::kBf16, DType::kFp8E4m3}) {
    std::string first;
    for (const TensorLayout& layout : Layouts(shape)) {
      const std::vector<std::byte> bytes = FillAs(shape, layout, dtype);
      const ConstTensor tensor{bytes.data(), dtype, shape, layout};
      const auto shard = EncodeShard(*backend, tensor, tensor, OptionsOf(Profile::kKvs2));
      ASSERT_TRUE(shard.ok()) << shard.status();
      first = first.empty() ? *shard : first;
      EXPECT_EQ(*shard, first) << DTypeName(dtype);
    }
  }
}

TEST(Layouts, AnyLayoutOutHoldsTheSameValuesAndNothingElseIsTouched) {
  const TensorShape shape{150, 2, 24};
  const auto backend = MakeCpuBackend(2);
  const Tensor k = testing::Gaussian(shape, 3);
  const auto bytes = EncodeShard(*backend, k.View(), k.View(), OptionsOf(Profile::kKvs3));
  ASSERT_TRUE(bytes.ok());
  const auto shard = Shard::Parse(*bytes);
  const auto expected = testing::DecodeAll(*backend, *bytes);
  ASSERT_TRUE(shard.ok() && expected.ok());
  constexpr float kUntouched = 12345;
  for (const TensorLayout& layout : Layouts(shape)) {
    std::vector<float> out(*LayoutExtent(shape, layout), kUntouched);
    std::vector<float> other(out.size());
    ASSERT_TRUE(
        DecodeShard(
            *backend, *shard, DecodeForm::kFull,
            MutableTensor{reinterpret_cast<std::byte*>(out.data()), DType::kFp32, shape, layout},
            MutableTensor{reinterpret_cast<std::byte*>(other.data()), DType::kFp32, shape, layout})
            .ok());
    size_t touched = 0;
    for (const float value : out) {
      touched += value != kUntouched ? 1 : 0;
    }
    EXPECT_EQ(touched, shape.entries());
    for (uint32_t t = 0; t < shape.tokens; ++t) {
      for (uint32_t h = 0; h < shape.kv_heads; ++h) {
        for (uint32_t c = 0; c < shape.head_dim; ++c) {
          ASSERT_EQ(out[layout.Offset(t, h) + c],
                    expected->k.values[k.View().layout.Offset(t, h) + c]);
        }
      }
    }
  }
}

TEST(Layouts, DtypeOutIsRoundedOnceFromFp32) {
  const TensorShape shape{20, 1, 32};
  const auto backend = MakeCpuBackend(1);
  const Tensor k = testing::Gaussian(shape, 3);
  const auto bytes = EncodeShard(*backend, k.View(), k.View(), OptionsOf(Profile::kKvs2));
  const auto shard = Shard::Parse(*bytes);
  const auto expected = testing::DecodeAll(*backend, *bytes);
  ASSERT_TRUE(shard.ok() && expected.ok());
  std::vector<uint16_t> out(shape.entries());
  std::vector<uint16_t> other(shape.entries());
  const auto decode = [&](DType dtype) {
    const MutableTensor a{reinterpret_cast<std::byte*>(out.data()), dtype, shape, LayoutThd(shape)};
    const MutableTensor b{reinterpret_cast<std::byte*>(other.data()), dtype, shape,
                          LayoutThd(shape)};
    ASSERT_TRUE(DecodeShard(*backend, *shard, DecodeForm::kFull, a, b).ok());
  };
  decode(DType::kFp16);
  for (size_t i = 0; i < out.size(); ++i) {
    EXPECT_EQ(out[i], stages::FloatToFp16(expected->k.values[i]));
  }
  decode(DType::kBf16);
  for (size_t i = 0; i < out.size(); ++i) {
    EXPECT_EQ(out[i], stages::FloatToBf16(expected->k.values[i]));
  }
}

TEST(Layouts, RawProfileIsBitExactInEveryDtype) {
  const TensorShape shape{130, 2, 16};
  const auto backend = MakeCpuBackend(1);
  for (const DType dtype : {DType::kFp32, DType::kFp16, DType::kBf16, DType::kFp8E4m3}) {
    // Every byte pattern, NaN payloads and negative zeros included.
    std::vector<std::byte> bytes(shape.entries() * DTypeBytes(dtype));
    for (size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = static_cast<std::byte>(i * 2654435761U >> 13);
    }
    const ConstTensor tensor{bytes.data(), dtype, shape, LayoutThd(shape)};
    const auto encoded = EncodeShard(*backend, tensor, tensor, OptionsOf(Profile::kRaw));
    ASSERT_TRUE(encoded.ok());
    const auto shard = Shard::Parse(*encoded);
    ASSERT_TRUE(shard.ok());
    std::vector<std::byte> k(bytes.size());
    std::vector<std::byte> v(bytes.size());
    ASSERT_TRUE(DecodeShard(*backend, *shard, DecodeForm::kFull,
                            MutableTensor{k.data(), dtype, shape, LayoutThd(shape)},
                            MutableTensor{v.data(), dtype, shape, LayoutThd(shape)})
                    .ok());
    EXPECT_EQ(k, bytes);
    EXPECT_EQ(v, bytes);
  }
}

TEST(Layouts, ToFloatsReadsEachDtype) {
  float out[3] = {};
  ToFloats("\x00\x3c\x00\xc0\x01\x00", DType::kFp16, 3, out);
  EXPECT_EQ(out[0], 1.0F);
  EXPECT_EQ(out[1], -2.0F);
  EXPECT_EQ(out[2], 0x1p-24F);
  ToFloats("\x80\x3f\x40\x40", DType::kBf16, 2, out);
  EXPECT_EQ(out[0], 1.0F);
  EXPECT_EQ(out[1], 3.0F);
  ToFloats("\x38\xfe\x01", DType::kFp8E4m3, 3, out);
  EXPECT_EQ(out[0], 1.0F);
  EXPECT_EQ(out[1], -448.0F);
  EXPECT_EQ(out[2], 0x1p-9F);
}

TEST(Layouts, ExtentOfPagesAndOverflow) {
  const TensorShape shape{33, 2, 8};
  EXPECT_EQ(LayoutExtent(shape, LayoutThd(shape)), 33U * 16);
  EXPECT_EQ(LayoutExtent(shape, LayoutHtd(shape)), 33U * 16);
  EXPECT_EQ(LayoutExtent(shape, LayoutBnhd(shape, 16)), 33U * 16);
  EXPECT_EQ(LayoutExtent(shape, LayoutBhnd(shape, 16)), 2U * 256 + 128 + 8);
  TensorLayout far = LayoutThd(shape);
  far.token_stride = uint64_t{1} << 60;
  EXPECT_FALSE(LayoutExtent(shape, far).has_value());
}

}  // namespace
}  // namespace kvshrink
