// Attend: scores and outputs held against plain attention over the decoded tensors.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
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

using AttendClient = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;

constexpr uint32_t kQueries = 5;
constexpr uint32_t kQHeads = 4;  // two for each kv head of kShape

struct Result {
  v1::AttendAnswer header;
  std::string body;

  std::vector<float> Floats(size_t first, size_t count) const {
    std::vector<float> values(count);
    std::memcpy(values.data(), body.data() + first * sizeof(float), count * sizeof(float));
    return values;
  }
};

std::vector<float> Queries(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> q(kQueries * kQHeads * kShape.head_dim);
  std::generate(q.begin(), q.end(), [&] { return normal(random); });
  return q;
}

std::string Bytes(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

v1::AttendHeader Header(v1::AttendMode mode) {
  v1::AttendHeader header;
  header.set_request_id(5);
  *header.add_chunks() = Id("a");
  *header.add_chunks() = Id("b");
  header.set_mode(mode);
  header.set_queries(kQueries);
  header.set_q_heads(kQHeads);
  header.set_head_dim(kShape.head_dim);
  header.set_dtype(v1::DTYPE_FP32);
  return header;
}

Result ReadResult(AttendClient& stream) {
  Result result;
  for (v1::AttendResponse response; stream.Read(&response);) {
    EXPECT_EQ(response.request_id(), 5U);
    if (response.has_header()) {
      result.header = response.header();
    } else {
      result.body += response.frame();
    }
    if (response.last()) {
      break;
    }
  }
  EXPECT_EQ(result.header.body_bytes(), result.body.size());
  return result;
}

Result Attend(Daemon& daemon, const v1::AttendHeader& header, const std::string& body) {
  grpc::ClientContext context;
  auto stream = daemon.stub().Attend(&context);
  SendObject<AttendClient, v1::AttendRequest>(*stream, header, body);
  stream->WritesDone();
  Result result = ReadResult(*stream);
  const grpc::Status status = stream->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  return result;
}

// Two chunks of one layer, "a" then "b", and plain attention over what they decode to.
class AttendTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kTokens = 2 * kShape.tokens;
  static constexpr uint32_t kRows = kQueries * kQHeads;

  AttendTest() {
    PutChunk(daemon_, "a", 1, 10);
    PutChunk(daemon_, "b", 1, 20, kShape, kShape.tokens);
    for (uint32_t i = 0; i < 2; ++i) {
      EncodeOptions options;
      options.first_token = i * kShape.tokens;
      const std::vector<float> values =
          Decode(Encode(kShape, MakeBody(kShape, 10 * (i + 1)), options));
      const auto middle = values.begin() + static_cast<std::ptrdiff_t>(kShape.entries());
      k_.insert(k_.end(), values.begin(), middle);
      v_.insert(v_.end(), middle, values.end());
    }
  }

  size_t At(uint32_t token, uint32_t q_head) const {
    return (size_t{token} * kShape.kv_heads + q_head / 2) * kShape.head_dim;
  }

  // first_query < 0: every key is seen.
  std::vector<float> Logits(const std::vector<float>& q, int first_query) const {
    std::vector<float> logits(size_t{kRows} * kTokens);
    for (uint32_t row = 0; row < kRows; ++row) {
      for (uint32_t token = 0; token < kTokens; ++token) {
        const float* a = &q[size_t{row} * kShape.head_dim];
        const float dot =
            std::inner_product(a, a + kShape.head_dim, &k_[At(token, row % kQHeads)], 0.0F);
        const int query = static_cast<int>(row / kQHeads);
        const bool seen = first_query < 0 || static_cast<int>(token) <= first_query + query;
        logits[size_t{row} * kTokens + token] =
            seen ? dot / std::sqrt(static_cast<float>(kShape.head_dim))
                 : -std::numeric_limits<float>::infinity();
      }
    }
    return logits;
  }

  Daemon daemon_;
  std::vector<float> k_, v_;  // [kTokens, kv_heads, head_dim]
};

TEST_F(AttendTest, ScoresAreTheLogits) {
  const std::vector<float> q = Queries(1);
  for (const int first_query : {-1, 70}) {
    v1::AttendHeader header = Header(v1::ATTEND_MODE_SCORES);
    if (first_query >= 0) {
      header.set_first_query(static_cast<uint32_t>(first_query));
    }
    const Result result = Attend(daemon_, header, Bytes(q));
    ASSERT_EQ(result.header.status().code(), 0) << result.header.status().message();
    EXPECT_EQ(result.header.tokens(), kTokens);
    const std::vector<float> want = Logits(q, first_query);
    ASSERT_EQ(result.body.size(), want.size() * sizeof(float));
    const std::vector<float> got = result.Floats(0, want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isinf(want[i])) {
        ASSERT_EQ(got[i], want[i]);
      } else {
        ASSERT_NEAR(got[i], want[i], 1e-3) << i;
      }
    }
  }
}

TEST_F(AttendTest, TopScoresAreTheLargestOfAll) {
  const std::vector<float> q = Queries(2);
  const size_t all = size_t{kRows} * kTokens;
  const std::vector<float> logits =
      Attend(daemon_, Header(v1::ATTEND_MODE_SCORES), Bytes(q)).Floats(0, all);
  for (const uint32_t k : {1U, 7U, kTokens, 1000U}) {
    v1::AttendHeader header = Header(v1::ATTEND_MODE_SCORES);
    header.set_top_k(k);
    const Result result = Attend(daemon_, header, Bytes(q));
    ASSERT_EQ(result.header.status().code(), 0) << result.header.status().message();
    const uint32_t kept = std::min(k, kTokens);
    ASSERT_EQ(result.header.top_k(), kept);
    ASSERT_EQ(result.body.size(), size_t{kRows} * kept * 8);
    const std::vector<float> scores = result.Floats(0, size_t{kRows} * kept);
    std::vector<uint32_t> tokens(scores.size());
    std::memcpy(tokens.data(), result.body.data() + scores.size() * 4, tokens.size() * 4);
    for (size_t row = 0; row < kRows; ++row) {
      std::vector<float> want(logits.begin() + static_cast<std::ptrdiff_t>(row * kTokens),
                              logits.begin() + static_cast<std::ptrdiff_t>((row + 1) * kTokens));
      for (size_t i = 0; i < kept; ++i) {
        EXPECT_EQ(scores[row * kept + i], logits[row * kTokens + tokens[row * kept + i]]);
      }
      std::sort(want.begin(), want.end(), std::greater<>());
      for (size_t i = 0; i < kept; ++i) {
        ASSERT_EQ(scores[row * kept + i], want[i]);
      }
    }
  }
}

TEST_F(AttendTest, OutputIsTheWeightedSumOfValuesWithItsLogSumExp) {
  const std::vector<float> q = Queries(3);
  v1::AttendHeader header = Header(v1::ATTEND_MODE_OUTPUT);
  header.set_first_query(90);
  const Result result = Attend(daemon_, header, Bytes(q));
  ASSERT_EQ(result.header.status().code(), 0) << result.header.status().message();
  const uint32_t d = kShape.head_dim;
  ASSERT_EQ(result.body.size(), size_t{kRows} * (d + 1) * sizeof(float));
  const std::vector<float> output = result.Floats(0, size_t{kRows} * d);
  const std::vector<float> lse = result.Floats(size_t{kRows} * d, kRows);
  const std::vector<float> logits = Logits(q, 90);
  for (uint32_t row = 0; row < kRows; ++row) {
    double sum = 0;
    std::vector<double> want(d);
    for (uint32_t token = 0; token < kTokens; ++token) {
      const double weight = std::exp(double{logits[size_t{row} * kTokens + token]});
      sum += weight;
      for (uint32_t i = 0; i < d; ++i) {
        want[i] += weight * double{v_[At(token, row % kQHeads) + i]};
      }
    }
    EXPECT_NEAR(lse[row], std::log(sum), 1e-3);
    for (uint32_t i = 0; i < d; ++i) {
      ASSERT_NEAR(output[size_t{row} * d + i], want[i] / sum, 1e-3);
    }
  }
}

TEST_F(AttendTest, BadRequestsGetOneErrorAndTheStreamGoesOn) {
  const std::pair<std::function<void(v1::AttendHeader&)>, const char*> cases[] = {
      {[](auto& h) { h.clear_chunks(); }, "'chunks' is 0 chunks"},
      {[](auto& h) { h.mutable_chunks(1)->clear_key(); }, "'chunks[1].key' is 0 bytes"},
      {[](auto& h) { h.set_layer(1); }, "'layer' is 1"},
      {[](auto& h) { h.set_layer(5000); }, "'layer' is 5000"},
      {[](auto& h) { h.clear_mode(); }, "'mode' is 0"},
      {[](auto& h) { h.set_queries(4097); }, "'queries' is 4097"},
      {[](auto& h) { h.set_q_heads(1025); }, "'q_heads' is 1025"},
      {[](auto& h) { h.set_q_heads(3); }, "q_heads"},
      {[](auto& h) { h.set_head_dim(31); }, "'head_dim' is 31"},
      {[](auto& h) { h.set_head_dim(~uint32_t{0}); }, "'head_dim' is 4294967295"},
      {[](auto& h) { h.clear_dtype(); }, "'dtype' is 0"},
      {[](auto& h) { h.set_scale(std::nan("")); }, "'scale' is nan"},
      {[](auto& h) { h.set_softcap(1e300); }, "'softcap' is 1e+300"},
      {[](auto& h) { h.set_window(4); }, "window"},
      {[](auto& h) {
         h.set_mode(v1::ATTEND_MODE_OUTPUT);
         h.set_top_k(4);
       },
       "'top_k' is 4"}};
  grpc::ClientContext context;
  auto stream = daemon_.stub().Attend(&context);
  for (const auto& [spoil, text] : cases) {
    v1::AttendHeader header = Header(v1::ATTEND_MODE_SCORES);
    spoil(header);
    SendObject<AttendClient, v1::AttendRequest>(*stream, header, "");
    const Result result = ReadResult(*stream);
    EXPECT_EQ(result.header.status().code(), StatusCode::INVALID_ARGUMENT) << text;
    EXPECT_THAT(result.header.status().message(), HasSubstr(text));
  }
  v1::AttendHeader missing = Header(v1::ATTEND_MODE_SCORES);
  *missing.mutable_chunks(1) = Id("missing");
  SendObject<AttendClient, v1::AttendRequest>(*stream, missing, Bytes(Queries(1)));
  const Result absent = ReadResult(*stream);
  EXPECT_EQ(absent.header.status().code(), StatusCode::NOT_FOUND);
  EXPECT_THAT(absent.header.status().message(), HasSubstr("missing"));
  SendObject<AttendClient, v1::AttendRequest>(*stream, Header(v1::ATTEND_MODE_SCORES),
                                              Bytes(Queries(1)));
  EXPECT_EQ(ReadResult(*stream).header.status().code(), 0);
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST_F(AttendTest, RefusesQueriesThatAreNotFinite) {
  std::vector<float> q = Queries(1);
  q[17] = std::numeric_limits<float>::quiet_NaN();
  const Result result = Attend(daemon_, Header(v1::ATTEND_MODE_SCORES), Bytes(q));
  EXPECT_EQ(result.header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(result.header.status().message(), HasSubstr("'queries[17]' is nan"));
}

TEST_F(AttendTest, RefusesAnswersAboveTheObjectLimit) {
  Options options = TestOptions();
  options.max_object_bytes = kShape.entries() * 8;
  Daemon daemon(options);
  PutChunk(daemon, "a", 1, 1);
  v1::AttendHeader header = Header(v1::ATTEND_MODE_SCORES);
  header.mutable_chunks()->RemoveLast();
  header.set_queries(64);
  const Result result = Attend(daemon, header, "");
  EXPECT_EQ(result.header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(result.header.status().message(), HasSubstr("'queries' is 64"));
}

TEST_F(AttendTest, ChunksOfDifferentHeadsDoNotMix) {
  PutChunk(daemon_, "wide", 1, 30, {64, 4, 32});
  v1::AttendHeader header = Header(v1::ATTEND_MODE_SCORES);
  *header.add_chunks() = Id("wide");
  const Result result = Attend(daemon_, header, "");
  EXPECT_EQ(result.header.status().code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(result.header.status().message(), HasSubstr("'chunks[2].kv_heads' is 4"));
}

TEST_F(AttendTest, ABlockKeptRawWithNanRanksLast) {
  std::string body = MakeBody(kShape, 7);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(body.data() + 10 * kShape.kv_heads * kShape.head_dim * sizeof(float), &nan,
              sizeof(nan));  // K, token 10, head 0
  PutAll(daemon_.stub(), {{TensorHeader(1, "nan", 0, 1), body}});
  ASSERT_EQ(Commit(daemon_, {"nan"}).statuses(0).code(), 0);
  v1::AttendHeader header = Header(v1::ATTEND_MODE_SCORES);
  header.clear_chunks();
  *header.add_chunks() = Id("nan");
  header.set_top_k(kShape.tokens);
  const Result result = Attend(daemon_, header, Bytes(Queries(1)));
  ASSERT_EQ(result.header.status().code(), 0) << result.header.status().message();
  const size_t count = size_t{kRows} * kShape.tokens;
  uint32_t token = 0;
  std::memcpy(&token, result.body.data() + (count + kShape.tokens - 1) * 4, 4);
  EXPECT_EQ(token, 10U);  // last of the first row
}

}  // namespace
}  // namespace kvshrink::service::testing
