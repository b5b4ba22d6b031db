// Compress and Decompress: tensors to shards and back, what bad input gets.
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/service/daemon_fixture.h"

namespace kvshrink::service::testing {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;

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

TEST(Compress, CodesKeysBeforeTheirEmbedding) {
  Daemon daemon;
  const TensorShape shape{300, 2, 64};
  const std::string body = MakeBody(shape, 5);
  v1::CompressHeader header;
  *header.mutable_tensor() = Spec(shape);
  header.set_body_bytes(body.size());
  header.mutable_encode()->set_first_token(1000);
  v1::Rope* rope = header.mutable_encode()->mutable_rope();
  rope->set_theta(1e6);
  rope->set_rotary_dim(48);
  rope->set_pairing(v1::ROPE_PAIRING_GPTJ);
  rope->set_scaling(v1::ROPE_SCALING_YARN);
  rope->set_factor(4);
  rope->set_original_max_position(8192);
  rope->set_beta_slow(2);
  rope->set_position_offset(-20);
  EncodeOptions options;
  options.first_token = 1000;
  options.rope = Rope{.theta = 1e6,
                      .rotary_dim = 48,
                      .pairing = RopePairing::kGptj,
                      .scaling = RopeScaling::kYarn,
                      .position_offset = -20,
                      .factor = 4,
                      .original_max_position = 8192,
                      .beta_slow = 2};
  grpc::ClientContext context;
  const auto coded = RunOne<v1::CompressRequest>(daemon.stub().Compress(&context), header, body);
  ASSERT_EQ(coded.header.status().code(), 0) << coded.header.status().message();
  EXPECT_TRUE(coded.body == Encode(shape, body, options));
  EXPECT_EQ(Shard::Parse(coded.body)->header().extensions.rope, options.rope);

  const auto refused = [&](auto change, const std::string& message) {
    v1::CompressHeader bad = header;
    change(bad.mutable_encode()->mutable_rope());
    grpc::ClientContext own_context;
    const auto answer =
        RunOne<v1::CompressRequest>(daemon.stub().Compress(&own_context), bad, body);
    EXPECT_EQ(answer.header.status().code(), StatusCode::INVALID_ARGUMENT) << message;
    EXPECT_THAT(answer.header.status().message(), HasSubstr(message));
  };
  refused([](v1::Rope* bad) { bad->set_theta(0); }, "'rope.theta' is 0");
  refused([](v1::Rope* bad) { bad->set_rotary_dim(66); }, "'rope.rotary_dim' is 66");
  refused([](v1::Rope* bad) { bad->set_pairing(static_cast<v1::RopePairing>(3)); },
          "'rope.pairing' is 3");
  refused([](v1::Rope* bad) { bad->set_scaling(static_cast<v1::RopeScaling>(-1)); },
          "'rope.scaling' is -1");
  refused(
      [](v1::Rope* bad) {
        bad->clear_factor();
        bad->set_factor(0);
      },
      "'rope.factor' is 0");
  refused([](v1::Rope* bad) { bad->set_low_freq_factor(3); }, "'rope.low_freq_factor' is 3");
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
