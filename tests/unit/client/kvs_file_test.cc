// .kvs files: what is written is read again, and each rule of the format has a file that breaks it.
#include "kvshrink/client/kvs_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kvshrink/client/trace_codec.h"
#include "temp_dir.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;

constexpr size_t kHeaderBytes = 48;
constexpr size_t kEntryBytes = 32;

struct ShardSpec {
  uint32_t layer = 0;
  uint32_t first_token = 0;
  TensorShape shape{8, 1, 16};
  DType dtype = DType::kFp32;
  bool keys_only = false;
};

std::string MakeShard(const ShardSpec& spec) {
  std::vector<float> values(spec.shape.entries());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>((i * 37 + spec.layer * 11 + spec.first_token) % 19) - 9;
  }
  const auto backend = MakeCpuBackend(1);
  const ConstTensor tensor{reinterpret_cast<const std::byte*>(values.data()), spec.dtype,
                           spec.shape, LayoutThd(spec.shape)};
  EncodeOptions options;
  options.layer = spec.layer;
  options.first_token = spec.first_token;
  options.raw_tokens = 2;
  auto shard =
      EncodeShard(*backend, tensor, spec.keys_only ? std::nullopt : std::optional(tensor), options);
  EXPECT_TRUE(shard.ok()) << shard.status();
  return *std::move(shard);
}

// Two chunks of 8 and 5 tokens, layers 3 and 9.
std::vector<std::string> GoodShards() {
  std::vector<std::string> shards;
  for (const uint32_t first_token : {0U, 8U}) {
    for (const uint32_t layer : {3U, 9U}) {
      shards.push_back(MakeShard({layer, first_token, {first_token == 0 ? 8U : 5U, 1, 16}}));
    }
  }
  return shards;
}

std::string GoodFile() {
  const TempDir dir;
  auto writer = KvsWriter::Create(dir.File("f"), {2, {3, 9}, {{"model", "m"}}});
  EXPECT_TRUE(writer.ok()) << writer.status();
  for (const std::string& shard : GoodShards()) {
    const absl::Status status = writer->Append(shard);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_TRUE(writer->Finish().ok());
  const std::string bytes = ReadFile(dir.File("f"));
  EXPECT_EQ(bytes.size(), writer->bytes());
  return bytes;
}

template <typename Number>
void Put(size_t offset, Number number, std::string* bytes) {
  std::memcpy(bytes->data() + offset, &number, sizeof(number));
}

template <typename Number>
Number Get(size_t offset, const std::string& bytes) {
  Number number;
  std::memcpy(&number, bytes.data() + offset, sizeof(number));
  return number;
}

// Makes the checksums right again, so that only the rule under test is broken.
void Seal(std::string* bytes) {
  const size_t directory = kEntryBytes * Get<uint32_t>(8, *bytes) * Get<uint32_t>(12, *bytes);
  const size_t metadata = Get<uint32_t>(16, *bytes);
  if (kHeaderBytes + directory + metadata <= bytes->size()) {
    Put<uint64_t>(24, XXH64(bytes->data() + kHeaderBytes, directory, 0), bytes);
    Put<uint64_t>(32, XXH64(bytes->data() + kHeaderBytes + directory, metadata, 0), bytes);
  }
  Put<uint64_t>(40, XXH64(bytes->data(), 40, 0), bytes);
}

absl::Status ReadAll(std::string_view bytes) {
  const auto file = KvsFile::Parse(bytes);
  if (!file.ok()) {
    return file.status();
  }
  return file->ForEachShard([](const KvsEntry&, const Shard&) { return absl::OkStatus(); });
}

TEST(KvsFile, ReadsWhatItWrote) {
  const std::string bytes = GoodFile();
  const auto file = KvsFile::Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE(file->bare_shard());
  EXPECT_FALSE(file->previews());
  EXPECT_EQ(file->chunks(), 2U);
  EXPECT_EQ(file->layers(), (std::vector<uint32_t>{3, 9}));
  EXPECT_EQ(file->metadata().at("model"), "m");
  const std::vector<std::string> shards = GoodShards();
  size_t number = 0;
  const absl::Status status =
      file->ForEachShard([&](const KvsEntry& entry, const Shard& shard) -> absl::Status {
        EXPECT_EQ(bytes.substr(entry.offset_bytes, entry.length_bytes), shards[number]);
        EXPECT_EQ(entry.chunk, number / 2);
        EXPECT_EQ(shard.header().layer, entry.layer);
        ++number;
        return absl::OkStatus();
      });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(number, 4U);
}

TEST(KvsFile, ReadsABareShard) {
  const std::string shard = MakeShard({7, 256});
  const auto file = KvsFile::Parse(shard);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->bare_shard());
  EXPECT_EQ(file->layers(), std::vector<uint32_t>{7});
  EXPECT_TRUE(ReadAll(shard).ok());
  EXPECT_FALSE(KvsFile::Parse(std::string_view(shard).substr(0, shard.size() - 1)).ok());
}

TEST(KvsFile, HoldsPreviewsWhenItSaysSo) {
  const TempDir dir;
  const std::string shard = MakeShard({0, 0, {128, 2, 32}});
  const auto parsed = Shard::Parse(shard);
  ASSERT_TRUE(parsed.ok());
  const std::string preview = shard.substr(0, parsed->preview_bytes());
  ASSERT_LT(preview.size(), shard.size());
  auto whole_only = KvsWriter::Create(dir.File("w"), {1, {0}, {}});
  ASSERT_TRUE(whole_only.ok());
  EXPECT_FALSE(whole_only->Append(preview).ok());
  auto writer = KvsWriter::Create(dir.File("p"), {1, {0}, {}, true});
  ASSERT_TRUE(writer.ok());
  ASSERT_TRUE(writer->Append(preview).ok());
  ASSERT_TRUE(writer->Finish().ok());
  const auto file = KvsFile::Open(dir.File("p"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->previews());
  ASSERT_TRUE(file->ReadShard(0).ok());
  EXPECT_TRUE(file->ReadShard(0)->preview());
}

struct Hostile {
  const char* name;
  std::function<void(std::string*)> damage;
  const char* field;
  bool seal = true;
};

std::vector<Hostile> HostileFiles() {
  const size_t entry = kHeaderBytes;
  const size_t metadata = kHeaderBytes + 4 * kEntryBytes;
  return {
      {"short", [](std::string* b) { b->resize(47); }, "'size'", false},
      {"magic", [](std::string* b) { (*b)[3] = 'X'; }, "'magic'"},
      {"version", [](std::string* b) { Put<uint16_t>(4, 2, b); }, "'version'"},
      {"header checksum", [](std::string* b) { Put<uint64_t>(40, 1, b); }, "'header_checksum'",
       false},
      {"flags", [](std::string* b) { Put<uint16_t>(6, 2, b); }, "'flags'"},
      {"no chunks", [](std::string* b) { Put<uint32_t>(8, 0, b); }, "'chunks'"},
      {"many chunks", [](std::string* b) { Put<uint32_t>(8, 65537, b); }, "'chunks'"},
      {"no layers", [](std::string* b) { Put<uint32_t>(12, 0, b); }, "'layers'"},
      {"many layers", [](std::string* b) { Put<uint32_t>(12, 4097, b); }, "'layers'"},
      {"many shards", [](std::string* b) { Put<uint32_t>(8, 65536, b), Put<uint32_t>(12, 17, b); },
       "'layers'"},
      {"metadata too short", [](std::string* b) { Put<uint32_t>(16, 1, b); }, "'metadata_bytes'"},
      {"metadata too long", [](std::string* b) { Put<uint32_t>(16, (1U << 20) + 1, b); },
       "'metadata_bytes'"},
      {"reserved", [](std::string* b) { Put<uint32_t>(20, 1, b); }, "'reserved'"},
      {"directory beyond the end", [](std::string* b) { Put<uint32_t>(8, 65536, b); }, "'size'"},
      {"directory checksum",
       [](std::string* b) {
         Put<uint64_t>(24, 1, b);
         Put<uint64_t>(40, XXH64(b->data(), 40, 0), b);
       },
       "'directory_checksum'", false},
      {"metadata checksum",
       [](std::string* b) {
         Put<uint64_t>(32, 1, b);
         Put<uint64_t>(40, XXH64(b->data(), 40, 0), b);
       },
       "'metadata_checksum'", false},
      {"chunk out of order", [=](std::string* b) { Put<uint32_t>(entry + 2 * kEntryBytes, 0, b); },
       "'directory[2].chunk'"},
      {"layer beyond the limit", [=](std::string* b) { Put<uint32_t>(entry + 4, 4096, b); },
       "'directory[0].layer'"},
      {"layers not ascending",
       [=](std::string* b) { Put<uint32_t>(entry + kEntryBytes + 4, 3, b); },
       "'directory[1].layer'"},
      {"other layers in the next chunk",
       [=](std::string* b) { Put<uint32_t>(entry + 3 * kEntryBytes + 4, 10, b); },
       "'directory[3].layer'"},
      {"offset into the directory", [=](std::string* b) { Put<uint64_t>(entry + 8, 48, b); },
       "'directory[0].offset'"},
      {"offset with a gap",
       [=](std::string* b) {
         const size_t at = entry + kEntryBytes + 8;
         Put<uint64_t>(at, Get<uint64_t>(at, *b) + 1, b);
       },
       "'directory[1].offset'"},
      {"length of less than a header", [=](std::string* b) { Put<uint64_t>(entry + 16, 95, b); },
       "'directory[0].length'"},
      {"length that overflows", [=](std::string* b) { Put<uint64_t>(entry + 16, ~uint64_t{0}, b); },
       "'directory[0].length'"},
      {"bytes behind the last shard", [](std::string* b) { b->push_back('x'); },
       "'directory[3].length'"},
      {"metadata no JSON", [=](std::string* b) { (*b)[metadata] = '['; }, "'metadata'"},
      {"metadata value no string",
       [=](std::string* b) { b->replace(metadata, 13, R"({"model":123})"); }, "'metadata.model'"},
      {"shard checksum", [](std::string* b) { b->back() = static_cast<char>(b->back() ^ 1); },
       "'directory[3].checksum'", false},
  };
}

TEST(KvsFile, NamesTheFieldOfAHostileFile) {
  const std::string good = GoodFile();
  ASSERT_TRUE(ReadAll(good).ok()) << ReadAll(good);
  for (const Hostile& hostile : HostileFiles()) {
    SCOPED_TRACE(hostile.name);
    std::string bytes = good;
    hostile.damage(&bytes);
    if (hostile.seal) {
      Seal(&bytes);
    }
    const absl::Status status = ReadAll(bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr(hostile.field));
  }
}

TEST(KvsFile, EveryFlippedBitIsFound) {
  const std::string good = GoodFile();
  for (size_t i = 0; i < good.size(); ++i) {
    std::string bytes = good;
    bytes[i] = static_cast<char>(bytes[i] ^ (1 << (i % 8)));
    ASSERT_FALSE(ReadAll(bytes).ok()) << "byte " << i;
  }
}

TEST(KvsFile, EveryPrefixIsRefused) {
  const std::string good = GoodFile();
  for (size_t size = 0; size < good.size(); ++size) {
    ASSERT_FALSE(ReadAll(std::string_view(good).substr(0, size)).ok()) << size;
  }
}

struct Disagreement {
  const char* name;
  size_t number;  // of the shard that is another
  ShardSpec shard;
  const char* field;
};

TEST(KvsFile, ShardsMustAgree) {
  const std::vector<Disagreement> table = {
      {"layer", 1, {4, 0}, "'layer'"},
      {"tokens within a chunk", 1, {9, 0, {7, 1, 16}}, "'tokens'"},
      {"first_token within a chunk", 1, {9, 1}, "'first_token'"},
      {"first_token after a chunk", 2, {3, 9}, "'first_token'"},
      {"kv_heads between chunks", 2, {3, 8, {8, 2, 16}}, "'kv_heads'"},
      {"head_dim between chunks", 2, {3, 8, {8, 1, 8}}, "'head_dim'"},
      {"dtype between chunks", 2, {3, 8, {8, 1, 16}, DType::kBf16}, "'dtype'"},
      {"values between chunks", 2, {3, 8, {8, 1, 16}, DType::kFp32, true}, "'flags'"},
  };
  const std::vector<std::string> good = GoodShards();
  for (const Disagreement& other : table) {
    SCOPED_TRACE(other.name);
    const TempDir dir;
    auto writer = KvsWriter::Create(dir.File("f"), {2, {3, 9}, {}});
    ASSERT_TRUE(writer.ok());
    for (size_t i = 0; i < other.number; ++i) {
      ASSERT_TRUE(writer->Append(good[i]).ok());
    }
    const absl::Status status = writer->Append(MakeShard(other.shard));
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr(other.field));
  }
}

// The reader must not rely on the writer's checks.
TEST(KvsFile, ReaderFindsADisagreementWithTheDirectory) {
  std::string bytes = GoodFile();
  for (const size_t entry : {kHeaderBytes, kHeaderBytes + 2 * kEntryBytes}) {
    Put<uint32_t>(entry + 4, 2, &bytes);  // layer 2 instead of 3, in both chunks
  }
  Seal(&bytes);
  const absl::Status status = ReadAll(bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'layer'"));
}

TEST(KvsWriter, RefusesContentsOutOfBounds) {
  const TempDir dir;
  const auto create = [&](KvsWriter::Contents contents) {
    return KvsWriter::Create(dir.File("f"), std::move(contents)).status().code();
  };
  EXPECT_EQ(create({0, {0}, {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create({1, {}, {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create({1, {1, 1}, {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create({1, {2, 1}, {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create({1, {4096}, {}}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create({1, {0}, {{"k", std::string(1 << 20, 'x')}}}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(dir.files(), 0U);
}

TEST(KvsWriter, FinishNeedsAllShards) {
  const TempDir dir;
  auto writer = KvsWriter::Create(dir.File("f"), {1, {0}, {}});
  ASSERT_TRUE(writer.ok());
  EXPECT_EQ(writer->Finish().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(writer->Append(MakeShard({})).ok());
  EXPECT_EQ(writer->Append(MakeShard({})).code(), absl::StatusCode::kOutOfRange);
  EXPECT_TRUE(writer->Finish().ok());
}

}  // namespace
}  // namespace kvshrink::client
