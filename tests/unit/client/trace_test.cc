#include "kvshrink/client/trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kvshrink/client/trace_codec.h"
#include "kvshrink/client/values.h"
#include "temp_dir.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;

struct Spec {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
};

// A safetensors file of zeros.
std::string MakeFile(const std::vector<Spec>& specs, const Metadata& metadata = {}) {
  const TempDir dir;
  std::vector<SafetensorsWriter::Tensor> tensors;
  for (const Spec& spec : specs) {
    tensors.push_back({spec.name, spec.dtype, spec.shape});
  }
  auto writer = SafetensorsWriter::Create(dir.File("t"), metadata, tensors);
  EXPECT_TRUE(writer.ok()) << writer.status();
  for (size_t i = 0; i < specs.size(); ++i) {
    uint64_t bytes = SafetensorsDtypeBytes(specs[i].dtype);
    for (const uint64_t size : specs[i].shape) {
      bytes *= size;
    }
    EXPECT_TRUE(writer->Write(i, 0, std::string(bytes, '\0')).ok());
  }
  EXPECT_TRUE(writer->Finish().ok());
  return ReadFile(dir.File("t"));
}

TEST(Trace, ReadsLayersInOrderOfTheirNumbers) {
  const std::string bytes =
      MakeFile({{"layer.10.k", "F16", {5, 2, 8}},
                {"layer.10.v", "F16", {5, 2, 8}},
                {"layer.2.k", "BF16", {5, 1, 4}},
                {"layer.2.v", "BF16", {5, 1, 4}},
                {"layer.2.q", "F32", {3, 6, 4}},
                {"something.else", "U8", {1}}},
               {{"scale", "0.25"}, {"raw_tokens", "7"}, {"rope_theta", "1e5"}});
  const auto trace = Trace::Parse(bytes);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->layers().size(), 2U);
  EXPECT_EQ(trace->layers()[0].layer, 2U);
  EXPECT_EQ(trace->layers()[1].layer, 10U);
  EXPECT_EQ(trace->layers()[0].k.dtype, DType::kBf16);
  ASSERT_TRUE(trace->layers()[0].q.has_value());
  EXPECT_EQ(trace->layers()[0].q->tokens, 3U);
  EXPECT_EQ(trace->layers()[0].q->q_heads, 6U);
  EXPECT_EQ(trace->tokens(), 5U);
  EXPECT_EQ(trace->scale(), 0.25);
  EXPECT_EQ(trace->raw_tokens(), 7U);
  EXPECT_EQ(trace->metadata().at("rope_theta"), "1e5");
  EXPECT_EQ(trace->ropes().Of(2)->theta, 1e5);
  EXPECT_EQ(trace->entries(), 2U * (5 * 2 * 8 + 5 * 4));
  EXPECT_EQ(trace->layer(10), &trace->layers()[1]);
  EXPECT_EQ(trace->layer(3), nullptr);
}

TEST(Trace, ALayerMayHaveKeysOnly) {
  const std::string bytes = MakeFile({{"layer.0.k", "F16", {4, 1, 8}},
                                      {"layer.0.q", "F16", {2, 3, 8}},
                                      {"layer.2.k", "F16", {4, 2, 8}},
                                      {"layer.2.v", "F16", {4, 2, 8}}},
                                     {});
  const auto trace = Trace::Parse(bytes);
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_FALSE(trace->layers()[0].v.has_value());
  EXPECT_TRUE(trace->layers()[0].q.has_value());
  EXPECT_TRUE(trace->layers()[1].v.has_value());
  EXPECT_EQ(trace->entries(), 4U * 8 + 2U * 4 * 2 * 8);
  EXPECT_EQ(trace->raw_bytes(), 2 * trace->entries());
}

struct Bad {
  const char* name;
  std::vector<Spec> specs;
  Metadata metadata;
  const char* field;
};

TEST(Trace, NamesTheFieldThatDoesNotFit) {
  const Spec k{"layer.0.k", "F16", {4, 2, 8}};
  const Spec v{"layer.0.v", "F16", {4, 2, 8}};
  const std::vector<Bad> table = {
      {"no layer", {{"x", "U8", {1}}}, {}, "layer.{i}.k"},
      {"no k", {v}, {}, "layer.0.k"},
      {"integers", {{"layer.0.k", "I16", {4, 2, 8}}, v}, {}, "layer.0.k.dtype"},
      {"two sizes", {{"layer.0.k", "F16", {4, 16}}, v}, {}, "layer.0.k.shape"},
      {"no tokens", {{"layer.0.k", "F16", {0, 2, 8}}, v}, {}, "layer.0.k.shape[0]"},
      {"too many heads", {{"layer.0.k", "F16", {1, 257, 1}}, v}, {}, "layer.0.k.shape[1]"},
      {"head too wide", {{"layer.0.k", "F16", {1, 1, 513}}, v}, {}, "layer.0.k.shape[2]"},
      {"v of another shape", {k, {"layer.0.v", "F16", {4, 1, 8}}}, {}, "layer.0.v"},
      {"v of another dtype", {k, {"layer.0.v", "BF16", {4, 2, 8}}}, {}, "layer.0.v"},
      {"layers of other lengths",
       {k, v, {"layer.1.k", "F16", {5, 2, 8}}, {"layer.1.v", "F16", {5, 2, 8}}},
       {},
       "layer.1.k.shape[0]"},
      {"layer beyond the limit",
       {{"layer.4096.k", "F16", {4, 2, 8}}, {"layer.4096.v", "F16", {4, 2, 8}}},
       {},
       "layer.4096"},
      {"more queries than tokens",
       {k, v, {"layer.0.q", "F16", {5, 2, 8}}},
       {},
       "layer.0.q.shape[0]"},
      {"q heads no multiple", {k, v, {"layer.0.q", "F16", {1, 3, 8}}}, {}, "layer.0.q.shape[1]"},
      {"q of another width", {k, v, {"layer.0.q", "F16", {1, 2, 4}}}, {}, "layer.0.q.shape[2]"},
      {"scale no number", {k, v}, {{"scale", "big"}}, "scale"},
      {"scale negative", {k, v}, {{"scale", "-1"}}, "scale"},
      {"scale infinite", {k, v}, {{"scale", "inf"}}, "scale"},
      {"raw_tokens negative", {k, v}, {{"raw_tokens", "-1"}}, "raw_tokens"},
      {"theta no number", {k, v}, {{"rope_theta", "big"}}, "rope.theta"},
      {"a rope of no theta", {k, v}, {{"rope_dim", "8"}}, "rope.theta"},
      {"no setting of a rope", {k, v}, {{"rope_theta", "1e4"}, {"rope_x", "8"}}, "rope.x"},
  };
  for (const Bad& bad : table) {
    SCOPED_TRACE(bad.name);
    const std::string bytes = MakeFile(bad.specs, bad.metadata);
    const auto trace = Trace::Parse(bytes);
    ASSERT_FALSE(trace.ok());
    EXPECT_EQ(trace.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(trace.status().message()), HasSubstr(bad.field));
  }
}

TEST(Trace, OpenNamesTheFile) {
  const TempDir dir;
  EXPECT_EQ(Trace::Open(dir.File("none")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Trace::Open("/dev/zero").status().code(), absl::StatusCode::kInvalidArgument);
  WriteFile(dir.File("bad"), "x");
  EXPECT_THAT(std::string(Trace::Open(dir.File("bad")).status().message()),
              HasSubstr(dir.File("bad")));
}

TEST(Trace, ReadsTheRecordedOnes) {
  const auto trace = Trace::Open(KVSHRINK_SOURCE_DIR "/tests/data/smollm2-512.safetensors");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->tokens(), 512U);
  EXPECT_EQ(trace->layers().size(), 6U);
  EXPECT_EQ(trace->layers()[5].layer, 29U);
  const TensorShape expected{512, 3, 64};
  EXPECT_EQ(trace->layers()[0].k.shape, expected);
}

TEST(Trace, ChunksCoverTheTokensOnce) {
  const std::vector<TokenSpan> chunks = ChunksOf(600, 256);
  ASSERT_EQ(chunks.size(), 3U);
  EXPECT_EQ(chunks[2].first_token, 512U);
  EXPECT_EQ(chunks[2].tokens, 88U);
  EXPECT_EQ(ChunksOf(256, 256).size(), 1U);
  EXPECT_EQ(ChunksOf(1, 65536)[0].tokens, 1U);
}

// All fp16 and fp8 codes against the definition of their formats.
TEST(Values, WidensEveryCode) {
  const auto expected = [](uint32_t code, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const auto mantissa = static_cast<double>(code & ((1U << mantissa_bits) - 1));
    const int exponent = static_cast<int>(code >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const double sign = (code >> (exponent_bits + mantissa_bits)) != 0 ? -1 : 1;
    const double scale = std::ldexp(1.0, mantissa_bits);
    return sign * (exponent == 0 ? std::ldexp(mantissa / scale, 1 - bias)
                                 : std::ldexp(1 + mantissa / scale, exponent - bias));
  };
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const auto half = static_cast<uint16_t>(code);
    float value = 0;
    ToFloats(DType::kFp16, reinterpret_cast<const std::byte*>(&half), 1, &value);
    if ((code & 0x7C00) == 0x7C00) {
      EXPECT_EQ(std::isnan(value), (code & 0x3FF) != 0) << code;
      EXPECT_EQ(std::isinf(value), (code & 0x3FF) == 0) << code;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected(code, 5, 10)) << code;
    }
  }
  for (uint32_t code = 0; code < 0x100; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    float value = 0;
    ToFloats(DType::kFp8E4m3, reinterpret_cast<const std::byte*>(&byte), 1, &value);
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(value)) << code;
    } else {
      ASSERT_EQ(static_cast<double>(value), expected(code, 4, 3)) << code;
    }
  }
  const uint16_t bf16 = 0xC049;
  float value = 0;
  ToFloats(DType::kBf16, reinterpret_cast<const std::byte*>(&bf16), 1, &value);
  EXPECT_EQ(value, -3.140625F);
}

TEST(Values, GathersStridedTensors) {
  std::vector<float> data(24);
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<float>(i);
  }
  const TensorShape shape{3, 2, 4};
  const ConstTensor heads_first{reinterpret_cast<const std::byte*>(data.data()), DType::kFp32,
                                shape, LayoutHtd(shape)};
  const std::vector<float> floats = ToFloats(heads_first);
  EXPECT_EQ(floats[0], 0);                     // token 0, head 0
  EXPECT_EQ(floats[4], 12);                    // token 0, head 1
  EXPECT_EQ(floats[(2 * 2 + 1) * 4 + 3], 23);  // token 2, head 1
}

}  // namespace
}  // namespace kvshrink::client
