// Put against a scripted server: the window, refusals, silence, and peers that break the protocol.
#include "kvshrink/client/put_stream.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "scripted_server.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;
using PutStreamTest = RemoteTest;

// Reads objects and hands each to `take` when its body is there.
grpc::Status ServeObjects(
    PutServerStream* stream,
    const std::function<void(const v1::PutHeader&, const std::string&)>& take) {
  v1::PutRequest message;
  v1::PutHeader header;
  std::string body;
  while (stream->Read(&message)) {
    if (message.has_header()) {
      header = message.header();
      body.clear();
    } else {
      EXPECT_FALSE(message.frame().empty());
      EXPECT_LE(message.frame().size(), kMaxFrameBytes);
      body += message.frame();
    }
    if (body.size() == header.body_bytes()) {
      take(header, body);
    }
  }
  return grpc::Status::OK;
}

void Answer(PutServerStream* stream, uint64_t object_id, int code = 0,
            uint32_t retry_after_ms = 0) {
  v1::PutResponse response;
  response.set_object_id(object_id);
  response.mutable_status()->set_code(code);
  response.mutable_status()->set_retry_after_ms(retry_after_ms);
  stream->Write(response);
}

PutObject MakeObject(uint32_t layer, const std::string& body) {
  PutObject object;
  object.header.set_layer(layer);
  object.owned = std::make_shared<const std::string>(body);
  object.parts = {*object.owned};
  return object;
}

TEST_F(PutStreamTest, SendsBodiesInFramesAndGivesEveryAnswer) {
  std::map<uint32_t, std::string> stored;
  service_.put = [&](grpc::ServerContext*, PutServerStream* stream) {
    return ServeObjects(stream, [&](const v1::PutHeader& header, const std::string& body) {
      stored[header.layer()] = body;
      Answer(stream, header.object_id());
    });
  };
  const auto remote = Connect();
  std::map<uint32_t, int> answers;
  const auto stream = remote->Put([&](const PutObject& object, const v1::PutResponse& answer) {
    EXPECT_EQ(answer.status().code(), 0);
    ++answers[object.header.layer()];
  });
  const std::string large((5 << 20) / 2 + 3, 'l');
  PutObject two_parts = MakeObject(1, large);
  two_parts.parts = {std::string_view(large).substr(0, 7), std::string_view(large).substr(7)};
  ASSERT_TRUE(stream->Send(MakeObject(0, "small")).ok());
  ASSERT_TRUE(stream->Send(std::move(two_parts)).ok());
  const absl::Status finished = stream->Finish();
  ASSERT_TRUE(finished.ok()) << finished;
  EXPECT_EQ(stored[0], "small");
  EXPECT_EQ(stored[1], large);
  EXPECT_EQ(answers, (std::map<uint32_t, int>{{0, 1}, {1, 1}}));
  EXPECT_GT(stream->wire_bytes(), large.size());
  EXPECT_LT(stream->wire_bytes(), large.size() + 300);
}

TEST_F(PutStreamTest, HoldsNoMoreThanItsWindow) {
  options_.inflight_bytes = 10'000;
  std::mutex mutex;
  std::vector<uint64_t> waiting;
  std::atomic<uint64_t> most_bytes{0};
  service_.put = [&](grpc::ServerContext*, PutServerStream* stream) {
    // Answers late, so that only the client's own bound can hold it back.
    std::atomic<bool> reading{true};
    std::thread answering([&] {
      while (true) {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        const bool last = !reading;
        std::vector<uint64_t> batch;
        {
          const std::lock_guard lock(mutex);
          batch.swap(waiting);
        }
        for (const uint64_t id : batch) {
          Answer(stream, id);
        }
        if (last) {
          return;
        }
      }
    });
    const grpc::Status status =
        ServeObjects(stream, [&](const v1::PutHeader& header, const std::string&) {
          const std::lock_guard lock(mutex);
          waiting.push_back(header.object_id());
          most_bytes = std::max<uint64_t>(most_bytes, waiting.size() * 1000);
        });
    reading = false;
    answering.join();
    return status;
  };
  const auto remote = Connect();
  int answers = 0;
  const auto stream = remote->Put([&](const PutObject&, const v1::PutResponse&) { ++answers; });
  for (uint32_t i = 0; i < 200; ++i) {
    ASSERT_TRUE(stream->Send(MakeObject(i, std::string(1000, 'x'))).ok());
  }
  ASSERT_TRUE(stream->Finish().ok());
  EXPECT_EQ(answers, 200);
  EXPECT_LE(most_bytes, options_.inflight_bytes);
  EXPECT_GT(most_bytes, 2000U) << "objects must be pipelined";
}

TEST_F(PutStreamTest, SendsARefusedObjectAgain) {
  std::map<uint32_t, int> seen;
  service_.put = [&](grpc::ServerContext*, PutServerStream* stream) {
    return ServeObjects(stream, [&](const v1::PutHeader& header, const std::string& body) {
      EXPECT_EQ(body, "body");
      const bool refuse = header.layer() == 1 && ++seen[1] < 3;
      Answer(stream, header.object_id(), refuse ? grpc::StatusCode::RESOURCE_EXHAUSTED : 0,
             refuse ? 20 : 0);
    });
  };
  const auto remote = Connect();
  int good = 0;
  const auto stream = remote->Put([&](const PutObject&, const v1::PutResponse& answer) {
    good += answer.status().code() == 0 ? 1 : 0;
  });
  const auto start = std::chrono::steady_clock::now();
  for (uint32_t layer = 0; layer < 3; ++layer) {
    ASSERT_TRUE(stream->Send(MakeObject(layer, "body")).ok());
  }
  ASSERT_TRUE(stream->Finish().ok());
  EXPECT_EQ(good, 3);
  EXPECT_EQ(seen[1], 3);
  EXPECT_EQ(stream->resent_objects(), 2U);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(40));
}

TEST_F(PutStreamTest, GivesUpARefusedObjectInTheEnd) {
  options_.retry_for_ms = 50;
  service_.put = [&](grpc::ServerContext*, PutServerStream* stream) {
    return ServeObjects(stream, [&](const v1::PutHeader& header, const std::string&) {
      Answer(stream, header.object_id(), grpc::StatusCode::RESOURCE_EXHAUSTED, 20);
    });
  };
  const auto remote = Connect();
  int refused = 0;
  const auto stream = remote->Put([&](const PutObject&, const v1::PutResponse& answer) {
    refused += answer.status().code() == grpc::StatusCode::RESOURCE_EXHAUSTED ? 1 : 0;
  });
  ASSERT_TRUE(stream->Send(MakeObject(0, "body")).ok());
  EXPECT_TRUE(stream->Finish().ok()) << "the stream itself is sound";
  EXPECT_EQ(refused, 1);
}

TEST_F(PutStreamTest, DoesNotWaitForASilentServerForEver) {
  options_.idle_timeout_ms = 100;
  service_.put = [](grpc::ServerContext* context, PutServerStream*) {
    while (!context->IsCancelled()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return grpc::Status::CANCELLED;
  };
  const auto remote = Connect();
  const auto stream = remote->Put([](const PutObject&, const v1::PutResponse&) {});
  // More than the transport takes without a reader: the write itself blocks.
  const absl::Status sent = stream->Send(MakeObject(0, std::string(8 << 20, 'x')));
  const absl::Status finished = stream->Finish();
  EXPECT_EQ(finished.code(), absl::StatusCode::kDeadlineExceeded) << sent << finished;
}

TEST_F(PutStreamTest, ReportsAStreamThatEnds) {
  service_.put = [](grpc::ServerContext*, PutServerStream*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "draining");
  };
  const auto remote = Connect();
  const auto stream = remote->Put([](const PutObject&, const v1::PutResponse&) {});
  stream->Send(MakeObject(0, "body")).IgnoreError();
  const absl::Status status = stream->Finish();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("draining"));
}

TEST_F(PutStreamTest, RefusesAnAnswerToNothing) {
  service_.put = [](grpc::ServerContext*, PutServerStream* stream) {
    return ServeObjects(stream,
                        [&](const v1::PutHeader&, const std::string&) { Answer(stream, 77); });
  };
  const auto remote = Connect();
  const auto stream = remote->Put([](const PutObject&, const v1::PutResponse&) {});
  stream->Send(MakeObject(0, "body")).IgnoreError();
  EXPECT_EQ(stream->Finish().code(), absl::StatusCode::kDataLoss);
}

TEST_F(PutStreamTest, MayBeAbandoned) {
  service_.put = [](grpc::ServerContext*, PutServerStream* stream) {
    return ServeObjects(stream, [](const v1::PutHeader&, const std::string&) {});
  };
  const auto remote = Connect();
  const auto stream = remote->Put([](const PutObject&, const v1::PutResponse&) {});
  EXPECT_TRUE(stream->Send(MakeObject(0, "body")).ok());
}

}  // namespace
}  // namespace kvshrink::client
