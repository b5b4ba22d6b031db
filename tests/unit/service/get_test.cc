// Get: forms, order, errors of chunks and of requests.
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/service/daemon_fixture.h"

namespace kvshrink::service::testing {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;

struct Part {
  v1::GetHeader header;
  std::string body;
};

v1::GetRequest Request(const std::vector<std::string>& keys, v1::GetForm form) {
  v1::GetRequest request;
  request.set_request_id(11);
  for (const std::string& key : keys) {
    *request.add_chunks() = Id(key);
  }
  request.set_form(form);
  return request;
}

using GetClient = grpc::ClientReaderWriter<v1::GetRequest, v1::GetResponse>;

// Reads the answers of one request, up to the one that is the last.
std::vector<Part> ReadParts(GetClient& stream, uint64_t request_id) {
  std::vector<Part> parts;
  for (v1::GetResponse response; stream.Read(&response);) {
    EXPECT_EQ(response.request_id(), request_id);
    if (response.has_header()) {
      parts.push_back({response.header(), ""});
    } else {
      EXPECT_LE(response.frame().size(), size_t{1} << 20);
      parts.back().body += response.frame();
    }
    if (response.last()) {
      break;
    }
  }
  for (const Part& part : parts) {
    EXPECT_EQ(part.header.body_bytes(), part.body.size());
  }
  return parts;
}

std::vector<Part> Get(Daemon& daemon, const v1::GetRequest& request) {
  grpc::ClientContext context;
  auto stream = daemon.stub().Get(&context);
  stream->Write(request);
  stream->WritesDone();
  std::vector<Part> parts = ReadParts(*stream, request.request_id());
  v1::GetResponse beyond;
  EXPECT_FALSE(stream->Read(&beyond));
  const grpc::Status status = stream->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  return parts;
}

EncodeOptions LayerOptions(uint32_t layer) {
  EncodeOptions options;
  options.layer = layer;
  return options;
}

TEST(Get, ShardsComeChunkByChunkLayerByLayer) {
  Daemon daemon;
  PutChunk(daemon, "a", 3, 10);
  PutChunk(daemon, "b", 2, 20);
  const std::vector<Part> parts = Get(daemon, Request({"b", "a"}, v1::GET_FORM_SHARD));
  ASSERT_EQ(parts.size(), 5U);
  const std::pair<const char*, uint32_t> order[] = {
      {"b", 0}, {"b", 1}, {"a", 0}, {"a", 1}, {"a", 2}};
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto& [key, layer] = order[i];
    EXPECT_EQ(parts[i].header.status().code(), 0);
    EXPECT_EQ(parts[i].header.chunk().key(), key);
    EXPECT_EQ(parts[i].header.shard().layer(), layer);
    EXPECT_EQ(parts[i].header.shard().profile(), v1::PROFILE_KVS2);
    EXPECT_EQ(parts[i].header.tier(), v1::TIER_HOST);
    const uint32_t seed = (*key == 'a' ? 10 : 20) + layer;
    EXPECT_TRUE(parts[i].body == Encode(kShape, MakeBody(kShape, seed), LayerOptions(layer)));
  }
}

TEST(Get, PicksLayers) {
  Daemon daemon;
  PutChunk(daemon, "a", 3, 10);
  v1::GetRequest request = Request({"a"}, v1::GET_FORM_SHARD);
  request.add_layers(0);
  request.add_layers(2);
  const std::vector<Part> parts = Get(daemon, request);
  ASSERT_EQ(parts.size(), 2U);
  EXPECT_EQ(parts[1].header.shard().layer(), 2U);
}

TEST(Get, DecodesWithTheOriginalDtype) {
  Daemon daemon;
  const TensorShape shape{700, 4, 64};  // several frames
  PutChunk(daemon, "a", 1, 10, shape);
  const std::vector<Part> parts = Get(daemon, Request({"a"}, v1::GET_FORM_DECODED));
  ASSERT_EQ(parts.size(), 1U);
  ASSERT_EQ(parts[0].header.status().code(), 0) << parts[0].header.status().message();
  const std::vector<float> values = Decode(Encode(shape, MakeBody(shape, 10), {}));
  ASSERT_EQ(parts[0].body.size(), values.size() * sizeof(float));
  EXPECT_EQ(0, std::memcmp(parts[0].body.data(), values.data(), parts[0].body.size()));
  EXPECT_EQ(parts[0].header.tensor().dtype(), v1::DTYPE_FP32);
  EXPECT_EQ(parts[0].header.tensor().v_offset_bytes(), parts[0].body.size() / 2);
  EXPECT_EQ(parts[0].header.tensor().layout().token_stride(), 4U * 64);
}

TEST(Get, DecodesChosenHeadsInTheLayoutAsked) {
  Daemon daemon;
  const TensorShape shape{64, 4, 32};
  PutChunk(daemon, "a", 1, 10, shape);
  v1::GetRequest request = Request({"a"}, v1::GET_FORM_DECODED);
  request.add_kv_heads(1);
  request.add_kv_heads(3);
  request.mutable_layout()->set_order(v1::ORDER_HTD);
  const std::vector<Part> parts = Get(daemon, request);
  ASSERT_EQ(parts[0].header.status().code(), 0) << parts[0].header.status().message();
  const std::vector<float> values = Decode(Encode(shape, MakeBody(shape, 10), {}));
  ASSERT_EQ(parts[0].body.size(), values.size() * sizeof(float) / 2);
  EXPECT_EQ(parts[0].header.tensor().shape().kv_heads(), 2U);
  for (uint32_t half = 0; half < 2; ++half) {
    for (uint32_t head = 0; head < 2; ++head) {
      for (uint32_t token = 0; token < 64; ++token) {
        const float* want = &values[half * shape.entries() + (token * 4 + 2 * head + 1) * 32];
        const size_t got = ((half * 2 + head) * 64 + token) * 32 * sizeof(float);
        ASSERT_EQ(0, std::memcmp(parts[0].body.data() + got, want, 32 * sizeof(float)));
      }
    }
  }
  request.mutable_kv_heads()->Set(1, 4);
  const std::vector<Part> beyond = Get(daemon, request);
  EXPECT_EQ(beyond[0].header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(beyond[0].header.status().message(), HasSubstr("'kv_heads' is 4"));
}

TEST(Get, LowRankIsThePreview) {
  Daemon daemon;
  PutChunk(daemon, "a", 1, 10);
  const std::vector<Part> parts = Get(daemon, Request({"a"}, v1::GET_FORM_LOW_RANK));
  const std::string shard = Encode(kShape, MakeBody(kShape, 10), {});
  EXPECT_EQ(parts[0].body, shard.substr(0, Shard::Parse(shard).value().preview_bytes()));
  EXPECT_LT(parts[0].body.size(), shard.size());
}

TEST(Get, WhatIsNotThereIsOneErrorAndTheOthersGoOn) {
  Daemon daemon;
  PutChunk(daemon, "a", 2, 10);
  PutAll(daemon.stub(), {{TensorHeader(1, "uncommitted", 0, 1), MakeBody(kShape, 1)}});
  const std::vector<Part> parts =
      Get(daemon, Request({"missing", "a", "uncommitted"}, v1::GET_FORM_SHARD));
  ASSERT_EQ(parts.size(), 4U);
  EXPECT_EQ(parts[0].header.status().code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(parts[0].header.chunk().key(), "missing");
  EXPECT_EQ(parts[1].header.status().code(), 0);
  EXPECT_EQ(parts[2].header.status().code(), 0);
  EXPECT_EQ(parts[3].header.status().code(), StatusCode::NOT_FOUND);
}

TEST(Get, ALayerThatTheChunkDoesNotHave) {
  Daemon daemon;
  PutChunk(daemon, "a", 2, 10);
  v1::GetRequest request = Request({"a"}, v1::GET_FORM_SHARD);
  request.add_layers(2);
  const std::vector<Part> parts = Get(daemon, request);
  ASSERT_EQ(parts.size(), 1U);
  EXPECT_EQ(parts[0].header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(parts[0].header.status().message(), HasSubstr("'layers' is 2"));
}

// Puts bytes into the store that no RPC would take.
void StoreDamaged(Daemon& daemon, const std::string& key, uint32_t layers, size_t flip_at) {
  const store::ChunkKey chunk{"default", "model", key};
  for (uint32_t layer = 0; layer < layers; ++layer) {
    std::string shard = Encode(kShape, MakeBody(kShape, layer), LayerOptions(layer));
    store::ShardMeta meta;
    meta.layer = layer;
    meta.profile = static_cast<uint8_t>(Profile::kKvs2);
    meta.tokens = kShape.tokens;
    meta.kv_heads = kShape.kv_heads;
    meta.head_dim = kShape.head_dim;
    meta.bytes = shard.size();
    if (layer == 1) {
      shard[flip_at] = static_cast<char>(shard[flip_at] ^ 1);
    }
    ASSERT_TRUE(daemon.server()
                    .store()
                    .Put(chunk, layers, meta, std::make_shared<const std::string>(shard))
                    .ok());
  }
  ASSERT_TRUE(daemon.server().store().Commit(chunk).ok());
}

TEST(Get, DamageIsDataLossThenAMissAndTheOthersGoOn) {
  Daemon daemon;
  StoreDamaged(daemon, "bad", 3, 120);
  PutChunk(daemon, "good", 1, 10);
  for (const v1::GetForm form : {v1::GET_FORM_SHARD, v1::GET_FORM_DECODED}) {
    const std::vector<Part> parts = Get(daemon, Request({"bad", "good"}, form));
    const bool first = form == v1::GET_FORM_SHARD;
    ASSERT_EQ(parts.size(), first ? 3U : 2U);
    if (first) {
      EXPECT_EQ(parts[0].header.status().code(), 0);
      EXPECT_EQ(parts[1].header.status().code(), StatusCode::DATA_LOSS);
      EXPECT_THAT(parts[1].header.status().message(), HasSubstr("checksum"));
      EXPECT_EQ(parts[1].header.shard().layer(), 1U);
    } else {
      EXPECT_EQ(parts[0].header.status().code(), StatusCode::NOT_FOUND);
    }
    EXPECT_EQ(parts.back().header.status().code(), 0);
  }
  EXPECT_GE(daemon.server().store().Counters().quarantined_shards, 1U);
}

TEST(Get, BadRequestsGetOneErrorAndTheStreamGoesOn) {
  Daemon daemon;
  PutChunk(daemon, "a", 1, 10);
  const std::pair<std::function<void(v1::GetRequest&)>, const char*> cases[] = {
      {[](auto& r) { r.clear_chunks(); }, "'chunks' is 0 chunks"},
      {[](auto& r) {
         for (int i = 0; i < 4096; ++i) {
           *r.add_chunks() = Id("a");
         }
       },
       "'chunks' is 4097 chunks"},
      {[](auto& r) { r.mutable_chunks(0)->clear_key(); }, "'chunks[0].key' is 0 bytes"},
      {[](auto& r) { r.set_form(v1::GET_FORM_UNSPECIFIED); }, "'form' is 0"},
      {[](auto& r) { r.set_form(static_cast<v1::GetForm>(8)); }, "'form' is 8"},
      {[](auto& r) {
         r.add_layers(1);
         r.add_layers(1);
       },
       "'layers[1]' is 1"},
      {[](auto& r) { r.add_layers(4096); }, "'layers[0]' is 4096"},
      {[](auto& r) { r.add_kv_heads(0); }, "'kv_heads' is 1 heads"},
      {[](auto& r) {
         r.set_form(v1::GET_FORM_DECODED);
         r.set_dtype(static_cast<v1::DType>(9));
       },
       "'dtype' is 9"},
      {[](auto& r) {
         r.set_form(v1::GET_FORM_DECODED);
         r.mutable_layout()->set_token_stride(1);
       },
       "'layout.head_stride' is 0"}};
  grpc::ClientContext context;
  auto stream = daemon.stub().Get(&context);
  for (const auto& [spoil, text] : cases) {
    v1::GetRequest request = Request({"a"}, v1::GET_FORM_SHARD);
    spoil(request);
    stream->Write(request);
    const std::vector<Part> parts = ReadParts(*stream, 11);
    ASSERT_EQ(parts.size(), 1U);
    EXPECT_EQ(parts[0].header.status().code(), StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(parts[0].header.status().message(), HasSubstr(text));
  }
  v1::GetRequest pull = Request({"a"}, v1::GET_FORM_SHARD);
  pull.set_source("127.0.0.1:1");
  stream->Write(pull);
  const std::vector<Part> pulled = ReadParts(*stream, 11);
  EXPECT_EQ(pulled[0].header.status().code(), StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(pulled[0].header.status().message(), HasSubstr("not enabled"));
  stream->Write(Request({"a"}, v1::GET_FORM_SHARD));
  EXPECT_EQ(ReadParts(*stream, 11)[0].header.status().code(), 0);
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Get, RequestsOfAStreamAreServedInOrder) {
  Daemon daemon;
  PutChunk(daemon, "a", 4, 10);
  grpc::ClientContext context;
  auto stream = daemon.stub().Get(&context);
  for (uint64_t id = 0; id < 5; ++id) {
    v1::GetRequest request = Request({"a"}, v1::GET_FORM_SHARD);
    request.set_request_id(id);
    stream->Write(request);
  }
  stream->WritesDone();
  for (uint64_t id = 0; id < 5; ++id) {
    EXPECT_EQ(ReadParts(*stream, id).size(), 4U);
  }
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Get, TheFirstLayerIsOnItsWayBeforeTheLastIsRead) {
  Daemon daemon;
  constexpr uint32_t kLayers = 48;
  PutChunk(daemon, "a", kLayers, 10, {1024, 4, 64}, 0, v1::PROFILE_RAW);  // 2 MiB a layer
  const uint64_t before = daemon.server().store().Counters().host_hits;
  grpc::ClientContext context;
  auto stream = daemon.stub().Get(&context);
  stream->Write(Request({"a"}, v1::GET_FORM_SHARD));
  stream->WritesDone();
  v1::GetResponse first;
  ASSERT_TRUE(stream->Read(&first));
  EXPECT_EQ(first.header().shard().layer(), 0U);
  absl::SleepFor(absl::Milliseconds(300));  // a client that doesn't read holds the daemon back
  EXPECT_LT(daemon.server().store().Counters().host_hits - before, kLayers / 2);
  uint32_t headers = 1;
  for (v1::GetResponse response; stream->Read(&response);) {
    headers += response.has_header() ? 1 : 0;
  }
  EXPECT_EQ(headers, kLayers);
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Get, IsRefusedWhenTheBudgetIsFull) {
  Options options = TestOptions();
  options.inflight_bytes = 100'000;
  Daemon daemon(options);
  PutChunk(daemon, "a", 1, 10);
  EXPECT_EQ(Get(daemon, Request({"a"}, v1::GET_FORM_SHARD))[0].header.status().code(), 0);
  v1::GetRequest request = Request({"a"}, v1::GET_FORM_DECODED);
  request.mutable_layout()->set_token_stride(256);  // of which 64 are used
  request.mutable_layout()->set_head_stride(32);
  const std::vector<Part> parts = Get(daemon, request);
  EXPECT_EQ(parts[0].header.status().code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_GT(parts[0].header.status().retry_after_ms(), 0U);
}

}  // namespace
}  // namespace kvshrink::service::testing
