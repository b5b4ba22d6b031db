// Put: what goes in, what bad input gets.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
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

using PutClient = grpc::ClientReaderWriter<v1::PutRequest, v1::PutResponse>;

TEST(Put, TensorBecomesTheShardThatTheCodecMakes) {
  Daemon daemon;
  const std::string body = MakeBody(kShape, 1);
  const PutResult result = PutAll(daemon.stub(), {{TensorHeader(9, "a", 0, 1), body}});
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  const v1::PutResponse& answer = result.answers.at(9);
  EXPECT_EQ(answer.status().code(), 0) << answer.status().message();
  EXPECT_FALSE(answer.already_present());
  EXPECT_EQ(answer.tier(), v1::TIER_HOST);
  const std::string shard = Encode(kShape, body, {});
  EXPECT_EQ(answer.stats().encoded_bytes(), shard.size());
  EXPECT_EQ(answer.stats().raw_bytes(), body.size());
  const double entries = 2.0 * static_cast<double>(kShape.entries());
  EXPECT_NEAR(answer.stats().bits_per_entry(), 8 * static_cast<double>(shard.size()) / entries,
              1e-9);
  EXPECT_NEAR((answer.stats().k().bits_per_entry() + answer.stats().v().bits_per_entry()) / 2,
              answer.stats().bits_per_entry(), 1e-9);
  EXPECT_GT(answer.stats().k().relative_error(), 0);
  EXPECT_LT(answer.stats().k().relative_error(), 0.5);
  EXPECT_EQ(answer.stats().k().blocks(), 2U);
}

TEST(Put, SameBytesAgainAreAlreadyPresentOthersAreRefused) {
  Daemon daemon;
  const std::string body = MakeBody(kShape, 1);
  PutChunk(daemon, "a", 1, 1);
  PutResult again = PutAll(daemon.stub(), {{TensorHeader(1, "a", 0, 1), body}});
  EXPECT_EQ(again.answers.at(1).status().code(), 0);
  EXPECT_TRUE(again.answers.at(1).already_present());
  PutResult other = PutAll(daemon.stub(), {{TensorHeader(1, "a", 0, 1), MakeBody(kShape, 2)}});
  EXPECT_EQ(other.answers.at(1).status().code(), StatusCode::ALREADY_EXISTS);
}

TEST(Put, TakesEncodedShards) {
  Daemon daemon;
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), {.layer = 1});
  const PutResult result = PutAll(daemon.stub(), {{ShardHeaderOf(1, "a", 1, 2, shard), shard}});
  const v1::PutResponse& answer = result.answers.at(1);
  EXPECT_EQ(answer.status().code(), 0) << answer.status().message();
  EXPECT_EQ(answer.stats().encoded_bytes(), shard.size());
  EXPECT_EQ(answer.stats().k().relative_error(), 0);
  EXPECT_EQ(answer.stats().v().blocks(), 2U);
}

TEST(Put, RefusesHostileShards) {
  Daemon daemon;
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), {});
  std::vector<PutObject> objects;
  for (size_t at = 0; at < shard.size(); at += 1 + shard.size() / 60) {
    std::string flipped = shard;
    flipped[at] = static_cast<char>(flipped[at] ^ 0x10);
    objects.push_back({ShardHeaderOf(objects.size(), "a", 0, 1, flipped), flipped});
  }
  const std::string cut = shard.substr(0, shard.size() - 1);
  objects.push_back({ShardHeaderOf(objects.size(), "a", 0, 1, cut), cut});
  objects.push_back({ShardHeaderOf(objects.size(), "a", 0, 1, "KVS1"), "KVS1"});
  const PutResult result = PutAll(daemon.stub(), objects);
  ASSERT_TRUE(result.status.ok());
  ASSERT_EQ(result.answers.size(), objects.size());
  for (const auto& [id, answer] : result.answers) {
    EXPECT_EQ(answer.status().code(), StatusCode::INVALID_ARGUMENT) << id;
    EXPECT_THAT(answer.status().message(), HasSubstr("field '")) << id;
  }
  EXPECT_EQ(daemon.Info().uncommitted_bytes(), 0U);
}

TEST(Put, RefusesAShardOfAnotherLayer) {
  Daemon daemon;
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), {.layer = 1});
  const PutResult result = PutAll(daemon.stub(), {{ShardHeaderOf(1, "a", 0, 2, shard), shard}});
  EXPECT_EQ(result.answers.at(1).status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(result.answers.at(1).status().message(), HasSubstr("field 'layer' is 0"));
}

TEST(Put, NonFiniteBlocksAreKeptRawAndCounted) {
  Daemon daemon;
  std::string body = MakeBody(kShape, 1);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(body.data() + body.size() - sizeof(nan), &nan, sizeof(nan));  // V, head 1
  const PutResult result = PutAll(daemon.stub(), {{TensorHeader(1, "a", 0, 1), body}});
  EXPECT_EQ(result.answers.at(1).status().code(), 0);
  EXPECT_EQ(result.answers.at(1).stats().k().raw_blocks(), 0U);
  EXPECT_EQ(result.answers.at(1).stats().v().raw_blocks(), 1U);
}

TEST(Put, BoundOnTheErrorHolds) {
  Daemon daemon;
  v1::PutHeader header = TensorHeader(1, "a", 0, 1);
  header.mutable_encode()->set_max_relative_error(1e-3);
  const PutResult result = PutAll(daemon.stub(), {{header, MakeBody(kShape, 1)}});
  const v1::KindStats& k = result.answers.at(1).stats().k();
  EXPECT_EQ(result.answers.at(1).status().code(), 0);
  EXPECT_LE(k.max_block_relative_error(), 1e-3);
  EXPECT_EQ(k.raw_blocks() + k.escalated_blocks(), 2U);
}

struct BadHeader {
  const char* text;
  std::function<void(v1::PutHeader&)> spoil;
};

const std::vector<BadHeader>& BadHeaders() {
  static const std::vector<BadHeader> cases = {
      {"'chunk.namespace' is 0 bytes", [](auto& h) { h.mutable_chunk()->clear_namespace_(); }},
      {"'chunk.namespace' is 257 bytes",
       [](auto& h) { h.mutable_chunk()->set_namespace_(std::string(257, 'n')); }},
      {"'chunk.key' is 0 bytes", [](auto& h) { h.mutable_chunk()->clear_key(); }},
      {"'chunk.key' is 129 bytes",
       [](auto& h) { h.mutable_chunk()->set_key(std::string(129, 'k')); }},
      {"'layers' is 0", [](auto& h) { h.set_layers(0); }},
      {"'layers' is 4097", [](auto& h) { h.set_layers(4097); }},
      {"'layer' is 1", [](auto& h) { h.set_layer(1); }},
      {"'body_bytes' is 0", [](auto& h) { h.set_body_bytes(0); }},
      {"'body_bytes' is 32764", [](auto& h) { h.set_body_bytes(h.body_bytes() - 4); }},
      {"'body_bytes' is 32769", [](auto& h) { h.set_body_bytes(h.body_bytes() + 1); }},
      {"'body_bytes' is 18446744073709551615", [](auto& h) { h.set_body_bytes(~uint64_t{0}); }},
      {"'content'", [](auto& h) { h.clear_content(); }},
      {"'tensor.dtype' is 0", [](auto& h) { h.mutable_tensor()->clear_dtype(); }},
      {"'tensor.dtype' is 77",
       [](auto& h) { h.mutable_tensor()->set_dtype(static_cast<v1::DType>(77)); }},
      {"tokens", [](auto& h) { h.mutable_tensor()->mutable_shape()->set_tokens(0); }},
      {"tokens", [](auto& h) { h.mutable_tensor()->mutable_shape()->set_tokens(65537); }},
      {"kv_heads", [](auto& h) { h.mutable_tensor()->mutable_shape()->set_kv_heads(257); }},
      {"head_dim", [](auto& h) { h.mutable_tensor()->mutable_shape()->set_head_dim(513); }},
      {"'tensor.layout.order' is 9",
       [](auto& h) { h.mutable_tensor()->mutable_layout()->set_order(static_cast<v1::Order>(9)); }},
      {"'tensor.layout.page_tokens' is 0",
       [](auto& h) { h.mutable_tensor()->mutable_layout()->set_order(v1::ORDER_BNHD); }},
      {"'tensor.layout.page_tokens' is 16",
       [](auto& h) { h.mutable_tensor()->mutable_layout()->set_page_tokens(16); }},
      {"'tensor.layout.head_stride' is 0",
       [](auto& h) { h.mutable_tensor()->mutable_layout()->set_token_stride(64); }},
      {"'tensor.layout.token_stride' is 63",
       [](auto& h) {
         h.mutable_tensor()->mutable_layout()->set_token_stride(63);
         h.mutable_tensor()->mutable_layout()->set_head_stride(32);
       }},
      {"'tensor.v_offset_bytes' is 4", [](auto& h) { h.mutable_tensor()->set_v_offset_bytes(4); }},
      {"'encode.profile' is 99",
       [](auto& h) { h.mutable_encode()->set_profile(static_cast<v1::Profile>(99)); }},
      {"'encode.max_relative_error' is -1",
       [](auto& h) { h.mutable_encode()->set_max_relative_error(-1); }},
      {"'encode.max_relative_error' is nan",
       [](auto& h) { h.mutable_encode()->set_max_relative_error(std::nan("")); }},
      {"'bits_per_entry' is -2", [](auto& h) { h.mutable_encode()->set_bits_per_entry(-2); }},
      {"'fixed_size' is true", [](auto& h) { h.mutable_encode()->set_fixed_size(true); }},
      {"'encode.first_token' is 4294967295",
       [](auto& h) { h.mutable_encode()->set_first_token(~uint32_t{0}); }},
      {"'encode' is set",
       [](auto& h) {
         h.mutable_encoded();
         h.mutable_encode();
       }},
  };
  return cases;
}

TEST(Put, BadHeadersAreRefusedAndTheOthersGoOn) {
  Daemon daemon;
  std::vector<PutObject> objects;
  for (const BadHeader& bad : BadHeaders()) {
    v1::PutHeader header = TensorHeader(objects.size(), "a", 0, 1);
    bad.spoil(header);
    objects.push_back({header, ""});
  }
  const uint64_t good = objects.size();
  objects.push_back({TensorHeader(good, "a", 0, 1), MakeBody(kShape, 1)});
  const PutResult result = PutAll(daemon.stub(), objects);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  for (size_t i = 0; i < BadHeaders().size(); ++i) {
    EXPECT_EQ(result.answers.at(i).status().code(), StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(result.answers.at(i).status().message(), HasSubstr(BadHeaders()[i].text));
  }
  EXPECT_EQ(result.answers.at(good).status().code(), 0);
}

TEST(Put, FramesOfARefusedObjectAreDropped) {
  Daemon daemon;
  v1::PutHeader bad = TensorHeader(1, "a", 0, 1);
  bad.set_layers(0);
  const PutResult result =
      PutAll(daemon.stub(),
             {{bad, MakeBody(kShape, 1)}, {TensorHeader(2, "a", 0, 1), MakeBody(kShape, 1)}});
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.answers.at(1).status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(result.answers.at(2).status().code(), 0);
}

TEST(Put, LayersOfAChunkMustAgree) {
  Daemon daemon;
  const PutResult result =
      PutAll(daemon.stub(), {{TensorHeader(1, "a", 0, 2), MakeBody(kShape, 1)}});
  EXPECT_EQ(result.answers.at(1).status().code(), 0);
  const PutResult other =
      PutAll(daemon.stub(), {{TensorHeader(1, "a", 1, 3), MakeBody(kShape, 2)}});
  EXPECT_EQ(other.answers.at(1).status().code(), StatusCode::INVALID_ARGUMENT);
}

// Sends the messages, then ends the stream; its status.
grpc::Status Sequence(Daemon& daemon, const std::vector<v1::PutRequest>& messages) {
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  for (const v1::PutRequest& message : messages) {
    stream->Write(message);
  }
  stream->WritesDone();
  for (v1::PutResponse answer; stream->Read(&answer);) {
  }
  return stream->Finish();
}

TEST(Put, IllegalSequencesEndTheStream) {
  Daemon daemon;
  v1::PutRequest header;
  *header.mutable_header() = TensorHeader(1, "a", 0, 1);
  const uint64_t bytes = header.header().body_bytes();
  const auto frame = [](uint64_t size) { return FrameOf<v1::PutRequest>(std::string(size, '\0')); };
  const std::pair<std::vector<v1::PutRequest>, const char*> cases[] = {
      {{frame(1)}, "no header"},
      {{header, frame(bytes - 1), frame(2)}, "beyond body_bytes"},
      {{header, frame(bytes), frame(1)}, "no header"},
      {{header, frame(0)}, "'frame' is 0 bytes"},
      {{header, frame((1 << 20) + 1)}, "'frame' is 1048577 bytes"},
      {{header, frame(1), header}, "before the body of object 1"},
      {{header, frame(1)}, "ended inside the body"},
      {{v1::PutRequest()}, "'part' is not set"}};
  for (const auto& [messages, text] : cases) {
    const grpc::Status status = Sequence(daemon, messages);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << text;
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  }
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
}

TEST(Put, AnIdInUseEndsTheStream) {
  auto gate = std::make_shared<absl::Notification>();
  ServerParts parts;
  parts.backend = std::make_unique<GatedBackend>(gate);
  Daemon daemon(TestOptions(), std::move(parts));
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  SendObject<PutClient, v1::PutRequest>(*stream, TensorHeader(1, "a", 0, 1), MakeBody(kShape, 1));
  SendObject<PutClient, v1::PutRequest>(*stream, TensorHeader(1, "b", 0, 1), "");
  for (v1::PutResponse answer; stream->Read(&answer);) {
  }
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("'object_id' is 1"));
  gate->Notify();
}

}  // namespace
}  // namespace kvshrink::service::testing
