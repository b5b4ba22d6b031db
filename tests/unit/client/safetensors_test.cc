#include "kvshrink/client/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "temp_dir.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;

std::string WithLength(uint64_t length, const std::string& rest) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) {
    bytes.push_back(static_cast<char>(length >> (8 * i)));
  }
  return bytes + rest;
}

std::string File(const std::string& header, size_t data_bytes) {
  return WithLength(header.size(), header + std::string(data_bytes, 'x'));
}

TEST(Safetensors, ReadsTensorsAndMetadata) {
  const std::string header =
      R"({"__metadata__":{"model":"m"},"b":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})";
  const std::string bytes = File(header, 8);
  const auto file = Safetensors::Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata().at("model"), "m");
  ASSERT_EQ(file->tensors().size(), 2U);
  const SafeTensor& b = file->tensors().at("b");
  EXPECT_EQ(b.dtype, "F16");
  EXPECT_EQ(b.shape, (std::vector<uint64_t>{2, 1}));
  EXPECT_EQ(b.bytes.data(), bytes.data() + 8 + header.size() + 4) << "a view, not a copy";
}

struct Hostile {
  const char* name;
  std::string bytes;
  const char* field;  // that the error names
};

std::string OneTensor(const std::string& entry, size_t data_bytes) {
  return File(R"({"a":)" + entry + "}", data_bytes);
}

std::vector<Hostile> HostileFiles() {
  const std::string deep = std::string(10000, '[') + std::string(10000, ']');
  return {
      {"empty", "", "size"},
      {"no length", "1234567", "size"},
      {"length beyond the file", WithLength(100, "{}"), "header_length"},
      {"length of all ones", WithLength(~uint64_t{0}, "{}"), "header_length"},
      {"length over the limit", WithLength(kMaxSafetensorsHeaderBytes + 1, "{}"), "header_length"},
      {"empty header", WithLength(0, ""), "header"},
      {"header no object", File("[]", 0), "header"},
      {"header no JSON", File("{\"a\":", 0), "header"},
      {"header no UTF-8", File("{\"\xff\":1}", 0), "header"},
      {"header too deep", File("{\"a\":" + deep + "}", 0), "header"},
      {"key twice", File(R"({"__metadata__":{},"__metadata__":{}})", 0), "header"},
      {"metadata value no string", File(R"({"__metadata__":{"k":1}})", 0), "__metadata__.k"},
      {"metadata no object", File(R"({"__metadata__":[]})", 0), "__metadata__"},
      {"entry no object", OneTensor("7", 0), "'a'"},
      {"dtype missing", OneTensor(R"({"shape":[1],"data_offsets":[0,1]})", 1), "a.dtype"},
      {"dtype unknown", OneTensor(R"({"dtype":"F7","shape":[1],"data_offsets":[0,1]})", 1),
       "a.dtype"},
      {"shape missing", OneTensor(R"({"dtype":"U8","data_offsets":[0,1]})", 1), "a.shape"},
      {"shape negative", OneTensor(R"({"dtype":"U8","shape":[-1],"data_offsets":[0,1]})", 1),
       "a.shape"},
      {"shape a fraction", OneTensor(R"({"dtype":"U8","shape":[1.0],"data_offsets":[0,1]})", 1),
       "a.shape"},
      {"shape too long",
       OneTensor(R"({"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]})", 1),
       "a.shape"},
      {"shape overflows",
       OneTensor(R"({"dtype":"F16","shape":[4294967296,2147483648],"data_offsets":[0,0]})", 0),
       "a.data_offsets"},
      {"offsets missing", OneTensor(R"({"dtype":"U8","shape":[1]})", 1), "a.data_offsets"},
      {"offsets of one", OneTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0]})", 1),
       "a.data_offsets"},
      {"offsets reversed", OneTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[1,0]})", 1),
       "a.data_offsets"},
      {"offsets beyond the data",
       OneTensor(R"({"dtype":"U8","shape":[9],"data_offsets":[0,9]})", 8), "a.data_offsets"},
      {"offsets don't fit the shape",
       OneTensor(R"({"dtype":"F16","shape":[2],"data_offsets":[0,2]})", 2), "a.data_offsets"},
      {"tensors overlap",
       File(
           R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
           3),
       "b.data_offsets"},
      {"a gap",
       File(
           R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
           3),
       "b.data_offsets"},
      {"data behind the last tensor",
       OneTensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})", 2), "size"},
  };
}

TEST(Safetensors, NamesTheFieldOfAHostileFile) {
  for (const Hostile& hostile : HostileFiles()) {
    SCOPED_TRACE(hostile.name);
    const auto file = Safetensors::Parse(hostile.bytes);
    ASSERT_FALSE(file.ok());
    EXPECT_EQ(file.status().code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(file.status().message()), HasSubstr(hostile.field));
    EXPECT_LT(file.status().message().size(), 500U) << "the input must not fill the log";
  }
}

TEST(Safetensors, EveryPrefixOfAFileIsRefused) {
  const std::string whole = File(R"({"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}})", 16);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(Safetensors::Parse(std::string_view(whole).substr(0, size)).ok()) << size;
  }
  EXPECT_TRUE(Safetensors::Parse(whole).ok());
}

TEST(SafetensorsWriter, WritesPartsInAnyOrder) {
  const TempDir dir;
  const std::string path = dir.File("t.safetensors");
  auto writer =
      SafetensorsWriter::Create(path, {{"k", "v"}}, {{"z", "U8", {2, 2}}, {"a", "F16", {1}}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  EXPECT_TRUE(writer->Write(1, 0, "zz").ok());
  EXPECT_TRUE(writer->Write(0, 2, "34").ok());
  EXPECT_EQ(writer->Finish().code(), absl::StatusCode::kFailedPrecondition)
      << "half of z is missing";
  EXPECT_TRUE(writer->Write(0, 0, "12").ok());
  EXPECT_EQ(writer->Write(0, 3, "56").code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(writer->Write(2, 0, "x").code(), absl::StatusCode::kOutOfRange);
  ASSERT_TRUE(writer->Finish().ok());

  const std::string bytes = ReadFile(path);
  const auto file = Safetensors::Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata().at("k"), "v");
  EXPECT_EQ(file->tensors().at("z").bytes, "1234");
  EXPECT_EQ(file->tensors().at("a").bytes, "zz");
  EXPECT_EQ((static_cast<const char*>(file->tensors().at("z").bytes.data()) - bytes.data()) % 8, 0)
      << "data starts at a multiple of 8";
}

TEST(SafetensorsWriter, LeavesNothingBehindWithoutFinish) {
  const TempDir dir;
  {
    auto writer = SafetensorsWriter::Create(dir.File("t"), {}, {{"a", "U8", {1}}});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE(writer->Write(0, 0, "x").ok());
    EXPECT_FALSE(std::filesystem::exists(dir.File("t")));
  }
  EXPECT_EQ(dir.files(), 0U);
}

TEST(SafetensorsWriter, RefusesWhatItCouldNotWrite) {
  const TempDir dir;
  const std::string path = dir.File("t");
  EXPECT_FALSE(SafetensorsWriter::Create(path, {}, {{"a", "F7", {1}}}).ok());
  EXPECT_FALSE(SafetensorsWriter::Create(path, {}, {{"a", "U8", {1}}, {"a", "U8", {1}}}).ok());
  EXPECT_FALSE(SafetensorsWriter::Create(path, {}, {{"a", "F64", {~uint64_t{0}}}}).ok());
  EXPECT_FALSE(SafetensorsWriter::Create(path, {{"k", "\xff"}}, {{"a", "U8", {1}}}).ok());
  EXPECT_FALSE(SafetensorsWriter::Create(dir.File("no/such/dir"), {}, {{"a", "U8", {1}}}).ok());
  EXPECT_FALSE(SafetensorsWriter::Create("/dev/null", {}, {{"a", "U8", {1}}}).ok());
  EXPECT_EQ(dir.files(), 0U);
}

}  // namespace
}  // namespace kvshrink::client
