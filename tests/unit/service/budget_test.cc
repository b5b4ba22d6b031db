// Bounded memory: what is refused, what is freed, who is cut off.
#include <string>
#include <thread>
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

constexpr uint64_t kBodyBytes = 2 * 64 * 2 * 32 * 4;  // of kShape

// A Put stream whose object 1 was admitted and has half of its body.
class HalfPut {
 public:
  explicit HalfPut(Daemon& daemon) : stream_(daemon.stub().Put(&context_)) {
    body_ = MakeBody(kShape, 1);
    SendObject<PutClient, v1::PutRequest>(*stream_, TensorHeader(1, "held", 0, 1),
                                          body_.substr(0, body_.size() / 2));
    EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() > 0; }));
  }
  ~HalfPut() { context_.TryCancel(); }

  PutClient& stream() { return *stream_; }
  grpc::ClientContext& context() { return context_; }
  void SendRest() { stream_->Write(FrameOf<v1::PutRequest>(body_.substr(body_.size() / 2))); }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<PutClient> stream_;
  std::string body_;
};

TEST(Budget, AnObjectThatDoesNotFitIsRefusedBeforeItsBody) {
  Options options = TestOptions();
  options.inflight_bytes = kBodyBytes;  // the shard needs some, too
  Daemon daemon(options);
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  v1::PutRequest header;
  *header.mutable_header() = TensorHeader(1, "a", 0, 1);
  stream->Write(header);
  v1::PutResponse answer;
  ASSERT_TRUE(stream->Read(&answer));  // though no frame was sent
  EXPECT_EQ(answer.status().code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_GT(answer.status().retry_after_ms(), 0U);
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Budget, WhatOneStreamHoldsAnotherCanNotHave) {
  Options options = TestOptions();
  options.inflight_bytes = 3 * kBodyBytes;
  Daemon daemon(options);
  {
    HalfPut held(daemon);
    const PutObject object = {TensorHeader(1, "a", 0, 1), MakeBody(kShape, 1)};
    const PutResult refused = PutAll(daemon.stub(), {object});
    ASSERT_TRUE(refused.status.ok());
    EXPECT_EQ(refused.answers.at(1).status().code(), StatusCode::RESOURCE_EXHAUSTED);
    held.SendRest();
    v1::PutResponse answer;
    ASSERT_TRUE(held.stream().Read(&answer));
    EXPECT_EQ(answer.status().code(), 0);
    const PutResult taken = PutAll(daemon.stub(), {object});
    EXPECT_EQ(taken.answers.at(1).status().code(), 0) << taken.answers.at(1).status().message();
  }
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
}

TEST(Budget, AStreamPacesItselfInsteadOfBeingRefused) {
  Options options = TestOptions();
  options.inflight_bytes = 5 * kBodyBytes;
  Daemon daemon(options);
  std::vector<PutObject> objects;
  for (uint32_t i = 0; i < 40; ++i) {
    objects.push_back({TensorHeader(i, "a", i, 40), MakeBody(kShape, i)});
  }
  const PutResult result = PutAll(daemon.stub(), objects);
  for (const auto& [id, answer] : result.answers) {
    EXPECT_EQ(answer.status().code(), 0) << answer.status().message();
  }
  EXPECT_EQ(result.answers.size(), 40U);
}

TEST(Budget, ACancelledClientFreesWhatItHeld) {
  Daemon daemon;
  HalfPut held(daemon);
  held.context().TryCancel();
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
  EXPECT_TRUE(Eventually([&] { return daemon.server().Drained(); }));
}

TEST(Budget, ACancelledClientFreesWhatWasInWork) {
  auto gate = std::make_shared<absl::Notification>();
  ServerParts parts;
  parts.backend = std::make_unique<GatedBackend>(gate);
  Daemon daemon(TestOptions(), std::move(parts));
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  for (uint64_t i = 0; i < 3; ++i) {
    SendObject<PutClient, v1::PutRequest>(
        *stream, TensorHeader(i, "a", static_cast<uint32_t>(i), 3), MakeBody(kShape, 1));
  }
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() >= 3 * kBodyBytes; }));
  context.TryCancel();
  gate->Notify();
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
}

TEST(Budget, AClientThatStopsSendingIsCutOff) {
  Options options = TestOptions();
  options.stall_timeout_s = 1;
  Daemon daemon(options);
  HalfPut held(daemon);
  v1::PutResponse answer;
  EXPECT_FALSE(held.stream().Read(&answer));
  const grpc::Status status = held.stream().Finish();
  EXPECT_EQ(status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(status.error_message(), HasSubstr("no frame"));
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
}

TEST(Budget, AClientThatStopsReadingIsCutOff) {
  Options options = TestOptions();
  options.stall_timeout_s = 1;
  Daemon daemon(options);
  PutChunk(daemon, "a", 16, 1, {1024, 4, 64}, 0, v1::PROFILE_RAW);
  grpc::ClientContext context;
  auto stream = daemon.stub().Get(&context);
  v1::GetRequest request;
  *request.add_chunks() = Id("a");
  request.set_form(v1::GET_FORM_SHARD);
  stream->Write(request);
  v1::GetResponse answer;
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() == 0; }));
  while (stream->Read(&answer)) {
    EXPECT_FALSE(answer.last());
  }
  EXPECT_EQ(stream->Finish().error_code(), StatusCode::CANCELLED);
}

TEST(Budget, AnIdleStreamIsLeftAlone) {
  Options options = TestOptions();
  options.stall_timeout_s = 1;
  Daemon daemon(options);
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  absl::SleepFor(absl::Milliseconds(2500));
  SendObject<PutClient, v1::PutRequest>(*stream, TensorHeader(1, "a", 0, 1), MakeBody(kShape, 1));
  v1::PutResponse answer;
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.status().code(), 0);
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Budget, UncommittedShardsHaveABudgetToo) {
  Options options = TestOptions();
  options.uncommitted_bytes = 4096;
  Daemon daemon(options);
  std::vector<PutObject> objects;
  for (uint32_t i = 0; i < 4; ++i) {
    objects.push_back({TensorHeader(i, "a", i, 4), MakeBody(kShape, i)});
  }
  const PutResult result = PutAll(daemon.stub(), objects);
  ASSERT_TRUE(result.status.ok());
  EXPECT_EQ(result.answers.at(3).status().code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_LE(daemon.Info().uncommitted_bytes(), 4096U);
}

TEST(Budget, DecompressAsksForTheTensorsMemory) {
  Options options = TestOptions();
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), {});
  options.inflight_bytes = shard.size() + 100;
  Daemon daemon(options);
  grpc::ClientContext context;
  auto stream = daemon.stub().Decompress(&context);
  v1::DecompressHeader header;
  header.set_body_bytes(shard.size());
  SendObject<grpc::ClientReaderWriter<v1::DecompressRequest, v1::DecompressResponse>,
             v1::DecompressRequest>(*stream, header, shard);
  v1::DecompressResponse answer;
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.header().status().code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(answer.last());
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
}

// One client of the crowd below: puts and gets a chunk of its own, or goes away in the middle of
// either.
void PutAndGet(Daemon& daemon, int client, int round) {
  const std::string key = std::to_string(client) + "." + std::to_string(round);
  const bool leaves = (client + round) % 3 == 0;
  grpc::ClientContext put_context;
  auto put = daemon.stub().Put(&put_context);
  for (uint32_t layer = 0; layer < 4; ++layer) {
    SendObject<PutClient, v1::PutRequest>(*put, TensorHeader(layer, key, layer, 4),
                                          MakeBody(kShape, layer));
  }
  if (leaves) {
    put_context.TryCancel();
    return;
  }
  put->WritesDone();
  for (v1::PutResponse answer; put->Read(&answer);) {
    EXPECT_EQ(answer.status().code(), 0) << answer.status().message();
  }
  EXPECT_TRUE(put->Finish().ok());
  EXPECT_EQ(Commit(daemon, {key}).statuses(0).code(), 0);
  grpc::ClientContext get_context;
  auto get = daemon.stub().Get(&get_context);
  v1::GetRequest request;
  *request.add_chunks() = Id(key);
  request.set_form(v1::GET_FORM_DECODED);
  get->Write(request);
  get->WritesDone();
  int headers = 0;
  for (v1::GetResponse answer; get->Read(&answer);) {
    headers += answer.has_header() && answer.header().status().code() == 0 ? 1 : 0;
    if ((client + round) % 3 == 1) {
      get_context.TryCancel();
      return;
    }
  }
  EXPECT_EQ(headers, 4);
}

TEST(Budget, ACrowdThatComesAndGoesLeavesNothingBehind) {
  Daemon daemon;
  std::vector<std::thread> clients;
  for (int client = 0; client < 8; ++client) {
    clients.emplace_back([&daemon, client] {
      for (int round = 0; round < 25; ++round) {
        PutAndGet(daemon, client, round);
      }
    });
  }
  for (std::thread& client : clients) {
    client.join();
  }
  EXPECT_TRUE(Eventually([&] { return daemon.server().Drained(); }));
  EXPECT_EQ(daemon.Info().inflight_bytes(), 0U);
}

}  // namespace
}  // namespace kvshrink::service::testing
