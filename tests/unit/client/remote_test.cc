// Get, Attend and the unary calls against a scripted server: refusals, silence, and peers that
// break the protocol.
#include "kvshrink/client/remote.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "scripted_server.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;

v1::GetResponse GetHeaderOf(uint64_t request_id, const std::string& key, uint32_t layer,
                            uint64_t body_bytes) {
  v1::GetResponse response;
  response.set_request_id(request_id);
  response.mutable_header()->mutable_chunk()->set_key(key);
  response.mutable_header()->mutable_shard()->set_layer(layer);
  response.mutable_header()->set_body_bytes(body_bytes);
  return response;
}

v1::GetResponse GetFrame(uint64_t request_id, const std::string& frame, bool last) {
  v1::GetResponse response;
  response.set_request_id(request_id);
  response.set_frame(frame);
  response.set_last(last);
  return response;
}

GetQuery QueryOf(uint32_t chunks) {
  GetQuery query{"n", {}, {}, v1::GET_FORM_SHARD, v1::DTYPE_UNSPECIFIED};
  for (uint32_t i = 0; i < chunks; ++i) {
    query.keys.push_back("k" + std::to_string(i));
  }
  return query;
}

TEST_F(RemoteTest, GetAsksForManyChunksInOrder) {
  std::atomic<int> requests{0};
  service_.get = [&](grpc::ServerContext*, GetServerStream* stream) {
    v1::GetRequest request;
    while (stream->Read(&request)) {
      ++requests;
      for (int i = 0; i < request.chunks_size(); ++i) {
        for (uint32_t layer = 0; layer < 2; ++layer) {
          const bool last = i + 1 == request.chunks_size() && layer == 1;
          stream->Write(GetHeaderOf(request.request_id(), request.chunks(i).key(), layer, 6));
          stream->Write(GetFrame(request.request_id(), "abc", false));
          stream->Write(GetFrame(request.request_id(), "def", last));
        }
      }
    }
    return grpc::Status::OK;
  };
  const auto remote = Connect();
  size_t count = 0;
  uint64_t wire_bytes = 0;
  const absl::Status status = remote->Get(
      QueryOf(300),
      [&](GotShard got) {
        EXPECT_EQ(got.chunk, count / 2);
        EXPECT_EQ(got.header.shard().layer(), count % 2);
        EXPECT_EQ(got.body, "abcdef");
        ++count;
        return absl::OkStatus();
      },
      &wire_bytes);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(count, 600U);
  EXPECT_GT(requests, 1);
  EXPECT_GT(wire_bytes, 600U * 6);
}

TEST_F(RemoteTest, GetGoesOnAfterAMissingChunk) {
  service_.get = [](grpc::ServerContext*, GetServerStream* stream) {
    v1::GetRequest request;
    stream->Read(&request);
    v1::GetResponse missing = GetHeaderOf(1, "k0", 0, 0);
    missing.mutable_header()->mutable_status()->set_code(grpc::StatusCode::NOT_FOUND);
    stream->Write(missing);
    stream->Write(GetHeaderOf(1, "k1", 0, 1));
    stream->Write(GetFrame(1, "x", true));
    return grpc::Status::OK;
  };
  const auto remote = Connect();
  std::vector<int> codes;
  const absl::Status status = remote->Get(QueryOf(2), [&](GotShard got) {
    codes.push_back(got.header.status().code());
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(codes, (std::vector<int>{grpc::StatusCode::NOT_FOUND, 0}));
}

TEST_F(RemoteTest, GetAsksAgainWhenARequestIsRefused) {
  int calls = 0;
  service_.get = [&](grpc::ServerContext*, GetServerStream* stream) {
    v1::GetRequest request;
    while (stream->Read(&request)) {
      if (++calls < 3) {
        v1::GetResponse refusal;
        refusal.set_request_id(request.request_id());
        refusal.mutable_header()->mutable_status()->set_code(grpc::StatusCode::RESOURCE_EXHAUSTED);
        refusal.mutable_header()->mutable_status()->set_retry_after_ms(5);
        refusal.set_last(true);
        stream->Write(refusal);
        continue;
      }
      stream->Write(GetHeaderOf(request.request_id(), "k0", 0, 1));
      stream->Write(GetFrame(request.request_id(), "x", true));
    }
    return grpc::Status::OK;
  };
  int shards = 0;
  const auto count = [&](GotShard) {
    ++shards;
    return absl::OkStatus();
  };
  const absl::Status status = Connect()->Get(QueryOf(1), count);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(shards, 1);

  calls = -1000;
  options_.retry_for_ms = 40;
  EXPECT_EQ(Connect()->Get(QueryOf(1), count).code(), absl::StatusCode::kResourceExhausted);
}

struct BrokenAnswer {
  const char* name;
  std::vector<v1::GetResponse> messages;
  const char* field;
};

TEST_F(RemoteTest, GetNamesTheFieldOfABrokenAnswer) {
  const std::vector<BrokenAnswer> table = {
      {"another request", {GetHeaderOf(2, "k0", 0, 1)}, "request_id"},
      {"another chunk", {GetHeaderOf(1, "other", 0, 1)}, "chunk.key"},
      {"a chunk too early", {GetHeaderOf(1, "k1", 0, 1)}, "chunk.key"},
      {"a layer twice",
       {GetHeaderOf(1, "k0", 0, 1), GetFrame(1, "x", false), GetHeaderOf(1, "k0", 0, 1)},
       "chunk.key"},
      {"frame without header", {GetFrame(1, "x", false)}, "frame"},
      {"empty frame", {GetHeaderOf(1, "k0", 0, 1), GetFrame(1, "", false)}, "frame"},
      {"frame beyond the body", {GetHeaderOf(1, "k0", 0, 1), GetFrame(1, "xy", false)}, "frame"},
      {"header in a body", {GetHeaderOf(1, "k0", 0, 2), GetHeaderOf(1, "k1", 0, 2)}, "header"},
      {"body larger than allowed", {GetHeaderOf(1, "k0", 0, uint64_t{1} << 40)}, "body_bytes"},
      {"end before the body's", {GetHeaderOf(1, "k0", 0, 2), GetFrame(1, "x", true)}, "last"},
      {"end before the last chunk", {GetHeaderOf(1, "k0", 0, 1), GetFrame(1, "x", true)}, "last"},
      {"end without last",
       {GetHeaderOf(1, "k0", 0, 1), GetFrame(1, "x", false), GetHeaderOf(1, "k1", 0, 1),
        GetFrame(1, "x", false)},
       "ended the stream"},
  };
  for (const BrokenAnswer& broken : table) {
    SCOPED_TRACE(broken.name);
    service_.get = [&](grpc::ServerContext*, GetServerStream* stream) {
      v1::GetRequest request;
      stream->Read(&request);
      for (const v1::GetResponse& message : broken.messages) {
        stream->Write(message);
      }
      return grpc::Status::OK;
    };
    const absl::Status status =
        Connect()->Get(QueryOf(2), [](GotShard) { return absl::OkStatus(); });
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr(broken.field));
  }
}

TEST_F(RemoteTest, GetStopsWhenItsVisitorDoes) {
  service_.get = [](grpc::ServerContext* context, GetServerStream* stream) {
    v1::GetRequest request;
    stream->Read(&request);
    for (uint32_t layer = 0; !context->IsCancelled(); ++layer) {
      stream->Write(GetHeaderOf(1, "k0", layer, 1));
      stream->Write(GetFrame(1, "x", false));
    }
    return grpc::Status::CANCELLED;
  };
  const absl::Status status =
      Connect()->Get(QueryOf(1), [](GotShard) { return absl::AbortedError("enough"); });
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
}

TEST_F(RemoteTest, GetDoesNotWaitForASilentServerForEver) {
  options_.idle_timeout_ms = 100;
  service_.get = [](grpc::ServerContext* context, GetServerStream*) {
    while (!context->IsCancelled()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return grpc::Status::CANCELLED;
  };
  const absl::Status status = Connect()->Get(QueryOf(1), [](GotShard) { return absl::OkStatus(); });
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
}

v1::AttendHeader AttendOf() {
  v1::AttendHeader header;
  header.set_mode(v1::ATTEND_MODE_OUTPUT);
  header.set_queries(1);
  header.set_q_heads(2);
  header.set_head_dim(3);
  return header;
}

TEST_F(RemoteTest, AttendSendsQueriesAndPutsTheAnswerTogether) {
  int calls = 0;
  service_.attend = [&](grpc::ServerContext*, AttendServerStream* stream) {
    std::string queries;
    v1::AttendRequest request;
    while (stream->Read(&request)) {
      queries += request.frame();
    }
    EXPECT_EQ(queries, std::string(3 << 20, 'q'));
    v1::AttendResponse response;
    response.set_request_id(1);
    if (++calls == 1) {
      response.mutable_header()->mutable_status()->set_code(grpc::StatusCode::RESOURCE_EXHAUSTED);
      response.mutable_header()->mutable_status()->set_retry_after_ms(5);
      response.set_last(true);
      stream->Write(response);
      return grpc::Status::OK;
    }
    response.mutable_header()->set_body_bytes(32);
    stream->Write(response);
    response.set_frame(std::string(20, 'a'));
    stream->Write(response);
    response.set_frame(std::string(12, 'b'));
    response.set_last(true);
    stream->Write(response);
    return grpc::Status::OK;
  };
  const auto result = Connect()->Attend(AttendOf(), std::string(3 << 20, 'q'));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->body, std::string(20, 'a') + std::string(12, 'b'));
  EXPECT_EQ(calls, 2) << "the refusal is tried again";
}

TEST_F(RemoteTest, AttendRefusesABodyOfAnotherSize) {
  service_.attend = [](grpc::ServerContext*, AttendServerStream* stream) {
    v1::AttendResponse response;
    response.set_request_id(1);
    response.mutable_header()->set_body_bytes(36);
    stream->Write(response);
    return grpc::Status::OK;
  };
  const auto result = Connect()->Attend(AttendOf(), "q");
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("body_bytes"));
}

TEST_F(RemoteTest, UnaryCallsHonourThePushback) {
  int calls = 0;
  service_.info = [&](grpc::ServerContext* context, v1::ServerInfoResponse* response) {
    response->set_version("v");
    if (++calls < 3) {
      context->AddTrailingMetadata("grpc-retry-pushback-ms", "10");
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "later");
    }
    return grpc::Status::OK;
  };
  const auto info = Connect()->Info();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(calls, 3);
}

TEST_F(RemoteTest, UnaryCallsFailAtOnceWithoutOne) {
  int calls = 0;
  service_.info = [&](grpc::ServerContext*, v1::ServerInfoResponse*) {
    ++calls;
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
  };
  EXPECT_EQ(Connect()->Info().status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(calls, 1);
}

TEST_F(RemoteTest, CommitAsksForManyChunksAndWantsAStatusForEach) {
  int extra = 0;
  std::vector<int> sizes;
  service_.commit = [&](const v1::CommitRequest& request, v1::CommitResponse* response) {
    sizes.push_back(request.chunks_size());
    for (int i = 0; i < request.chunks_size() + extra; ++i) {
      response->add_statuses()->set_code(request.chunks(0).key() == "k0" ? 0 : 5);
    }
  };
  const auto statuses = Connect()->Commit("n", QueryOf(5000).keys);
  ASSERT_TRUE(statuses.ok()) << statuses.status();
  EXPECT_EQ(sizes, (std::vector<int>{4096, 904}));
  EXPECT_TRUE((*statuses)[0].ok());
  EXPECT_EQ((*statuses)[4999].code(), absl::StatusCode::kNotFound);
  extra = 1;
  EXPECT_EQ(Connect()->Commit("n", {"k0"}).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(RemoteTest, ListFollowsPagesButNotInCircles) {
  service_.list = [](const v1::ListRequest& request, v1::ListResponse* response) {
    response->add_chunks();
    response->set_next_page_token(request.page_token().empty() ? "a" : "");
  };
  int count = 0;
  const auto counting = [&](const v1::ChunkInfo&) {
    ++count;
    return absl::OkStatus();
  };
  EXPECT_TRUE(Connect()->List("n", counting).ok());
  EXPECT_EQ(count, 2);
  service_.list = [](const v1::ListRequest&, v1::ListResponse* response) {
    response->set_next_page_token("a");
  };
  EXPECT_EQ(Connect()->List("n", counting).code(), absl::StatusCode::kDataLoss);
}

TEST(Remote, NamesTheServerThatIsNotThere) {
  RemoteOptions options;
  options.server = "127.0.0.1:1";
  const absl::Status status = (*Remote::Create(options))->Info().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("127.0.0.1:1"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("is kvshrinkd running there?"));
}

TEST(Remote, WaitsForAServerThatStartsLater) {
  ScriptedService service;
  service.info = [](grpc::ServerContext*, v1::ServerInfoResponse* response) {
    response->set_version("late");
    return grpc::Status::OK;
  };
  const auto start = [&service](const std::string& address, int* port) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), port);
    builder.RegisterService(&service);
    return builder.BuildAndStart();
  };
  int port = 0;
  start("127.0.0.1:0", &port)->Shutdown();  // a port that is free now
  RemoteOptions options;
  options.server = "127.0.0.1:" + std::to_string(port);
  options.connect_timeout_ms = 20'000;
  std::unique_ptr<grpc::Server> server;
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    server = start(options.server, &port);
  });
  const auto info = (*Remote::Create(options))->Info();
  late.join();
  ASSERT_NE(server, nullptr);
  EXPECT_TRUE(info.ok()) << info.status();
}

TEST(Remote, ChecksItsOptions) {
  RemoteOptions options;
  options.server = "";
  EXPECT_FALSE(Remote::Create(options).ok());
  options = {};
  options.idle_timeout_ms = 0;
  EXPECT_FALSE(Remote::Create(options).ok());
}

}  // namespace
}  // namespace kvshrink::client
