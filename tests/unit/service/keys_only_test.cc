// Objects without V on every RPC: the latents and shared rotary keys of MLA.
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/service/daemon_fixture.h"

namespace kvshrink::service::testing {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;

constexpr TensorShape kLatent = {140, 1, 96};

// K of MakeBody alone, fp32 [T,H,D].
std::string Keys() {
  const std::string body = MakeBody(kLatent, 3);
  return body.substr(0, body.size() / 2);
}

ConstTensor View(const std::string& keys) {
  return {reinterpret_cast<const std::byte*>(keys.data()), DType::kFp32, kLatent,
          LayoutThd(kLatent)};
}

std::string Shard() {
  const std::string keys = Keys();
  return EncodeShard(*MakeCpuBackend(1), View(keys), std::nullopt, {}).value();
}

std::string DecodedKeys(const std::string& bytes, DecodeForm form = DecodeForm::kFull) {
  std::string keys(kLatent.entries() * sizeof(float), '\0');
  const MutableTensor out{reinterpret_cast<std::byte*>(keys.data()), DType::kFp32, kLatent,
                          LayoutThd(kLatent)};
  const auto shard = kvshrink::Shard::Parse(bytes, Extent::kAllowPreview).value();
  EXPECT_TRUE(DecodeShard(*MakeCpuBackend(1), shard, form, out, std::nullopt).ok());
  return keys;
}

v1::TensorSpec KeysSpec() {
  v1::TensorSpec spec = Spec(kLatent);
  spec.set_keys_only(true);
  return spec;
}

v1::PutHeader KeysHeader(const std::string& key) {
  v1::PutHeader header = TensorHeader(1, key, 0, 1, kLatent);
  *header.mutable_tensor() = KeysSpec();
  header.set_body_bytes(Keys().size());
  return header;
}

struct Got {
  v1::GetHeader header;
  std::string body;
};

Got GetOne(Daemon& daemon, const std::string& key, v1::GetForm form) {
  grpc::ClientContext context;
  auto stream = daemon.stub().Get(&context);
  v1::GetRequest request;
  *request.add_chunks() = Id(key);
  request.set_form(form);
  if (form == v1::GET_FORM_DECODED) {
    request.add_kv_heads(0);
  }
  stream->Write(request);
  stream->WritesDone();
  Got got;
  for (v1::GetResponse response; stream->Read(&response);) {
    if (response.has_header()) {
      got.header = response.header();
    } else {
      got.body += response.frame();
    }
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(got.header.status().code(), 0) << got.header.status().message();
  return got;
}

TEST(KeysOnly, PutAndGetInEveryForm) {
  Daemon daemon;
  const std::string shard = Shard();
  v1::PutHeader coded = ShardHeaderOf(2, "shard", 0, 1, shard);
  const PutResult put = PutAll(daemon.stub(), {{KeysHeader("tensor"), Keys()}, {coded, shard}});
  ASSERT_EQ(put.answers.size(), 2U);
  for (const auto& [id, answer] : put.answers) {
    ASSERT_EQ(answer.status().code(), 0) << answer.status().message();
    EXPECT_TRUE(answer.stats().has_k());
    EXPECT_FALSE(answer.stats().has_v());
    EXPECT_EQ(answer.stats().raw_bytes(), Keys().size());
    EXPECT_EQ(answer.stats().k().blocks(), 2U);
    EXPECT_EQ(answer.stats().encoded_bytes(), shard.size());
    EXPECT_NEAR(answer.stats().bits_per_entry(), answer.stats().k().bits_per_entry(), 1e-9);
  }
  EXPECT_GT(put.answers.at(1).stats().k().relative_error(), 0);
  ASSERT_EQ(Commit(daemon, {"tensor", "shard"}).statuses(0).code(), 0);
  for (const char* key : {"tensor", "shard"}) {
    const Got whole = GetOne(daemon, key, v1::GET_FORM_SHARD);
    EXPECT_EQ(whole.body, shard);
    EXPECT_TRUE(whole.header.shard().keys_only());
    const Got decoded = GetOne(daemon, key, v1::GET_FORM_DECODED);
    EXPECT_EQ(decoded.body, DecodedKeys(shard));
    EXPECT_TRUE(decoded.header.tensor().keys_only());
    EXPECT_EQ(decoded.header.tensor().v_offset_bytes(), 0U);
    const Got low = GetOne(daemon, key, v1::GET_FORM_LOW_RANK);
    EXPECT_EQ(low.body, shard.substr(0, low.body.size()));
    EXPECT_EQ(DecodedKeys(low.body, DecodeForm::kLowRank),
              DecodedKeys(shard, DecodeForm::kLowRank));
  }
  grpc::ClientContext context;
  v1::StatRequest request;
  *request.mutable_chunk() = Id("tensor");
  v1::StatResponse stat;
  ASSERT_TRUE(daemon.stub().Stat(&context, request, &stat).ok());
  EXPECT_TRUE(stat.shards(0).keys_only());
  EXPECT_EQ(stat.chunk().raw_bytes(), Keys().size());
}

TEST(KeysOnly, HeadersThatContradictThemselves) {
  Daemon daemon;
  struct Bad {
    const char* text;
    std::function<void(v1::PutHeader&)> spoil;
  };
  const std::vector<Bad> table = {
      {"'tensor.v_offset_bytes' is 53760: must be 0 with keys_only",
       [](auto& h) { h.mutable_tensor()->set_v_offset_bytes(53760); }},
      {"'body_bytes' is 107520: must be 53760", [](auto& h) { h.set_body_bytes(107520); }},
      {"'body_bytes' is 53760: must be 107520",
       [](auto& h) { h.mutable_tensor()->set_keys_only(false); }},
  };
  for (const Bad& bad : table) {
    v1::PutHeader header = KeysHeader("a");
    bad.spoil(header);
    const PutResult result =
        PutAll(daemon.stub(), {{header, std::string(header.body_bytes(), '\0')}});
    ASSERT_EQ(result.answers.size(), 1U) << bad.text;
    EXPECT_EQ(result.answers.at(1).status().code(), StatusCode::INVALID_ARGUMENT) << bad.text;
    EXPECT_THAT(result.answers.at(1).status().message(), HasSubstr(bad.text));
  }
}

v1::AttendAnswer Attend(Daemon& daemon, v1::AttendMode mode, std::string* body) {
  grpc::ClientContext context;
  auto stream = daemon.stub().Attend(&context);
  v1::AttendHeader header;
  *header.add_chunks() = Id("a");
  header.set_mode(mode);
  header.set_queries(2);
  header.set_q_heads(3);
  header.set_head_dim(kLatent.head_dim);
  header.set_dtype(v1::DTYPE_FP32);
  const std::vector<float> q(size_t{2} * 3 * kLatent.head_dim, 0.25F);
  using Client = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;
  SendObject<Client, v1::AttendRequest>(
      *stream, header,
      std::string(reinterpret_cast<const char*>(q.data()), q.size() * sizeof(float)));
  stream->WritesDone();
  v1::AttendAnswer answer;
  for (v1::AttendResponse response; stream->Read(&response);) {
    if (response.has_header()) {
      answer = response.header();
    } else {
      *body += response.frame();
    }
  }
  EXPECT_TRUE(stream->Finish().ok());
  return answer;
}

TEST(KeysOnly, AttendGivesScoresAndRefusesOutput) {
  Daemon daemon;
  ASSERT_EQ(PutAll(daemon.stub(), {{KeysHeader("a"), Keys()}}).answers.at(1).status().code(), 0);
  ASSERT_EQ(Commit(daemon, {"a"}).statuses(0).code(), 0);
  std::string body;
  const v1::AttendAnswer scores = Attend(daemon, v1::ATTEND_MODE_SCORES, &body);
  EXPECT_EQ(scores.status().code(), 0) << scores.status().message();
  EXPECT_EQ(scores.tokens(), kLatent.tokens);
  ASSERT_EQ(body.size(), size_t{2} * 3 * kLatent.tokens * sizeof(float));
  const std::string decoded = DecodedKeys(Shard());
  std::vector<float> k(kLatent.entries());
  std::memcpy(k.data(), decoded.data(), decoded.size());
  std::vector<float> logits(body.size() / sizeof(float));
  std::memcpy(logits.data(), body.data(), body.size());
  for (uint32_t token = 0; token < kLatent.tokens; ++token) {
    float sum = 0;
    for (uint32_t c = 0; c < kLatent.head_dim; ++c) {
      sum += 0.25F * k[size_t{token} * kLatent.head_dim + c];
    }
    EXPECT_NEAR(logits[token], sum / std::sqrt(static_cast<float>(kLatent.head_dim)), 1e-3);
  }
  std::string none;
  const v1::AttendAnswer output = Attend(daemon, v1::ATTEND_MODE_OUTPUT, &none);
  EXPECT_EQ(output.status().code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(output.status().message(), HasSubstr("ATTEND_MODE_OUTPUT"));
  EXPECT_THAT(output.status().message(), HasSubstr("keys only"));
  EXPECT_TRUE(none.empty());
}

TEST(KeysOnly, CompressAndDecompress) {
  Daemon daemon;
  const std::string keys = Keys();
  std::string shard;
  {
    grpc::ClientContext context;
    auto stream = daemon.stub().Compress(&context);
    v1::CompressHeader header;
    header.set_object_id(1);
    *header.mutable_tensor() = KeysSpec();
    header.set_body_bytes(keys.size());
    using Client = grpc::ClientReaderWriter<v1::CompressRequest, v1::CompressResponse>;
    SendObject<Client, v1::CompressRequest>(*stream, header, keys);
    stream->WritesDone();
    for (v1::CompressResponse response; stream->Read(&response);) {
      if (response.has_header()) {
        EXPECT_EQ(response.header().status().code(), 0) << response.header().status().message();
        EXPECT_FALSE(response.header().stats().has_v());
      } else {
        shard += response.frame();
      }
    }
    EXPECT_TRUE(stream->Finish().ok());
  }
  EXPECT_EQ(shard, Shard());
  grpc::ClientContext context;
  auto stream = daemon.stub().Decompress(&context);
  v1::DecompressHeader header;
  header.set_object_id(1);
  header.set_body_bytes(shard.size());
  using Client = grpc::ClientReaderWriter<v1::DecompressRequest, v1::DecompressResponse>;
  SendObject<Client, v1::DecompressRequest>(*stream, header, shard);
  stream->WritesDone();
  std::string body;
  for (v1::DecompressResponse response; stream->Read(&response);) {
    if (response.has_header()) {
      EXPECT_TRUE(response.header().tensor().keys_only());
      EXPECT_TRUE(response.header().shard().keys_only());
    } else {
      body += response.frame();
    }
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(body, DecodedKeys(shard));
}

}  // namespace
}  // namespace kvshrink::service::testing
