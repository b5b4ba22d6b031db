// Put, Compress, Decompress: what goes in, what comes back, what bad input gets.
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

// One object through Compress or Decompress: the answer's header and body.
template <class Answer>
struct Coded {
  Answer header;
  std::string body;
};

template <class Request, class Stream, class Header>
auto RunOne(Stream stream, const Header& header, const std::string& body) {
  SendObject<typename Stream::element_type, Request>(*stream, header, body);
  stream->WritesDone();
  using Response = std::conditional_t<std::is_same_v<Request, v1::CompressRequest>,
                                      v1::CompressResponse, v1::DecompressResponse>;
  Coded<std::decay_t<decltype(std::declval<Response>().header())>> coded;
  bool last = false;
  for (Response response; stream->Read(&response);) {
    EXPECT_FALSE(last);
    EXPECT_EQ(response.object_id(), header.object_id());
    EXPECT_LE(response.frame().size(), size_t{1} << 20);
    if (response.has_header()) {
      coded.header = response.header();
    } else {
      coded.body += response.frame();
    }
    last = response.last();
  }
  EXPECT_TRUE(last);
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(coded.header.body_bytes(), coded.body.size());
  return coded;
}

Coded<v1::CompressAnswer> Compress(Daemon& daemon, const TensorShape& shape,
                                   const std::string& body, v1::Profile profile) {
  v1::CompressHeader header;
  header.set_object_id(3);
  *header.mutable_tensor() = Spec(shape);
  header.mutable_encode()->set_profile(profile);
  header.set_layer(2);
  header.set_body_bytes(body.size());
  grpc::ClientContext context;
  return RunOne<v1::CompressRequest>(daemon.stub().Compress(&context), header, body);
}

Coded<v1::DecompressAnswer> Decompress(Daemon& daemon, const v1::DecompressHeader& header,
                                       const std::string& body) {
  grpc::ClientContext context;
  return RunOne<v1::DecompressRequest>(daemon.stub().Decompress(&context), header, body);
}

std::string Bytes(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

TEST(Compress, GivesTheShardAndDecompressItsTensors) {
  Daemon daemon;
  const TensorShape shape{600, 4, 64};  // more than one frame both ways
  const std::string body = MakeBody(shape, 5);
  for (const v1::Profile profile : {v1::PROFILE_KVS2, v1::PROFILE_RAW}) {
    const auto compressed = Compress(daemon, shape, body, profile);
    ASSERT_EQ(compressed.header.status().code(), 0) << compressed.header.status().message();
    EncodeOptions options;
    options.profile = static_cast<Profile>(profile - 1);
    options.layer = 2;
    EXPECT_TRUE(compressed.body == Encode(shape, body, options));
    EXPECT_EQ(compressed.header.stats().encoded_bytes(), compressed.body.size());
    v1::DecompressHeader header;
    header.set_body_bytes(compressed.body.size());
    const auto decompressed = Decompress(daemon, header, compressed.body);
    ASSERT_EQ(decompressed.header.status().code(), 0) << decompressed.header.status().message();
    EXPECT_TRUE(decompressed.body == Bytes(Decode(compressed.body)));
    EXPECT_EQ(decompressed.header.shard().layer(), 2U);
    EXPECT_EQ(decompressed.header.tensor().v_offset_bytes(), body.size() / 2);
  }
  EXPECT_EQ(daemon.Info().chunks(), 0U);
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
}

TEST(Decompress, LowRankTakesAPreviewAndOnlyThen) {
  Daemon daemon;
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), {});
  const std::string preview = shard.substr(0, Shard::Parse(shard).value().preview_bytes());
  v1::DecompressHeader header;
  header.set_body_bytes(preview.size());
  EXPECT_EQ(Decompress(daemon, header, preview).header.status().code(),
            StatusCode::INVALID_ARGUMENT);
  header.set_low_rank(true);
  const auto decoded = Decompress(daemon, header, preview);
  ASSERT_EQ(decoded.header.status().code(), 0) << decoded.header.status().message();
  EXPECT_TRUE(decoded.body == Bytes(Decode(preview, DecodeForm::kLowRank)));
}

TEST(Decompress, GivesDtypeAndLayoutAsAsked) {
  Daemon daemon;
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), {});
  v1::DecompressHeader header;
  header.set_body_bytes(shard.size());
  header.mutable_layout()->set_order(v1::ORDER_HTD);
  header.mutable_layout()->set_token_stride(40);  // 8 elements of padding behind each row
  header.mutable_layout()->set_head_stride(40 * 64);
  const auto decoded = Decompress(daemon, header, shard);
  ASSERT_EQ(decoded.header.status().code(), 0) << decoded.header.status().message();
  const std::vector<float> thd = Decode(shard);
  for (uint32_t head = 0; head < 2; ++head) {
    for (uint32_t token = 0; token < 64; ++token) {
      const size_t at = (head * 40 * 64 + token * 40) * sizeof(float);
      EXPECT_EQ(0, std::memcmp(decoded.body.data() + at, &thd[(token * 2 + head) * 32],
                               32 * sizeof(float)));
    }
  }
  header.clear_layout();
  header.set_dtype(v1::DTYPE_BF16);
  EXPECT_EQ(Decompress(daemon, header, shard).body.size(), 2 * kShape.entries() * 2);
}

TEST(Decompress, RefusesBadInput) {
  Daemon daemon;
  std::string shard = Encode(kShape, MakeBody(kShape, 1), {});
  v1::DecompressHeader header;
  header.set_body_bytes(shard.size());
  header.mutable_layout()->set_page_tokens(3);
  auto answer = Decompress(daemon, header, "");
  EXPECT_EQ(answer.header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(answer.header.status().message(), HasSubstr("'layout.page_tokens' is 3"));
  header.clear_layout();
  header.mutable_layout()->set_token_stride(uint64_t{1} << 24);  // small shard, huge answer
  header.mutable_layout()->set_head_stride(32);
  answer = Decompress(daemon, header, shard);
  EXPECT_EQ(answer.header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(answer.header.status().message(), HasSubstr("bytes"));
  header.clear_layout();
  shard[20] = static_cast<char>(shard[20] ^ 1);
  answer = Decompress(daemon, header, shard);
  EXPECT_EQ(answer.header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(answer.header.status().message(), HasSubstr("header_checksum"));
}

TEST(Compress, TakesPagedTensors) {
  Daemon daemon;
  const std::string thd = MakeBody(kShape, 1);
  // [B,H,N,D] pages of 16 tokens.
  const TensorLayout paged = LayoutBhnd(kShape, 16);
  std::string body(thd.size(), '\0');
  for (size_t half = 0; half < 2; ++half) {
    for (uint32_t token = 0; token < 64; ++token) {
      for (uint32_t head = 0; head < 2; ++head) {
        std::memcpy(body.data() + half * body.size() / 2 + paged.Offset(token, head) * 4,
                    thd.data() + half * thd.size() / 2 + (token * 2 + head) * 32 * 4, 32 * 4);
      }
    }
  }
  v1::CompressHeader header;
  *header.mutable_tensor() = Spec(kShape);
  header.mutable_tensor()->mutable_layout()->set_order(v1::ORDER_BHND);
  header.mutable_tensor()->mutable_layout()->set_page_tokens(16);
  header.set_body_bytes(body.size());
  grpc::ClientContext context;
  const auto coded = RunOne<v1::CompressRequest>(daemon.stub().Compress(&context), header, body);
  EXPECT_TRUE(coded.body == Encode(kShape, thd, {}));
}

}  // namespace
}  // namespace kvshrink::service::testing
