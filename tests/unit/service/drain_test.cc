// Health, metrics, and the end: admitted work is finished, new work refused.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/observe/address.h"
#include "tests/unit/service/daemon_fixture.h"
#include "tests/unit/service/raw_call.h"

namespace kvshrink::service::testing {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using PutClient = grpc::ClientReaderWriter<v1::PutRequest, v1::PutResponse>;

std::string HttpGet(const std::string& address, const std::string& path) {
  const HostPort at = HostPort::Parse("http", address).value();
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(at.port));
  inet_pton(AF_INET, at.host.c_str(), &to.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  std::string answer;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) == 0) {
    const std::string request = "GET " + path + " HTTP/1.1\r\nHost: test\r\n\r\n";
    (void)!write(fd, request.data(), request.size());
    char buffer[4096];
    for (ssize_t n = 0; (n = read(fd, buffer, sizeof(buffer))) > 0;) {
      answer.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return answer;
}

std::string Health(Daemon& daemon, const std::string& service) {
  RawCall call(daemon.channel(), "/grpc.health.v1.Health/Check");
  call.Write(HealthRequest(service));
  return call.Read().value_or("no answer");
}

TEST(Drain, HealthTurnsForCheckAndWatch) {
  Daemon daemon;
  EXPECT_EQ(Health(daemon, ""), kServing);
  EXPECT_EQ(Health(daemon, "kvshrink.v1.KVShrink"), kServing);
  EXPECT_EQ(Health(daemon, "unknown"), "no answer");
  RawCall watch(daemon.channel(), "/grpc.health.v1.Health/Watch");
  watch.Write(HealthRequest("kvshrink.v1.KVShrink"));
  EXPECT_EQ(watch.Read().value_or(""), kServing);
  daemon.server().BeginDrain();
  EXPECT_EQ(watch.Read().value_or(""), kNotServing);
  EXPECT_EQ(Health(daemon, ""), kNotServing);
  EXPECT_EQ(Health(daemon, "kvshrink.v1.KVShrink"), kNotServing);
}

TEST(Drain, AdmittedObjectsAreFinishedNewOnesRefused) {
  Daemon daemon;
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  const std::string body = MakeBody(kShape, 1);
  SendObject<PutClient, v1::PutRequest>(*stream, TensorHeader(1, "a", 0, 1), body.substr(0, 100));
  ASSERT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() > 0; }));
  daemon.server().BeginDrain();
  EXPECT_TRUE(daemon.Info().draining());
  EXPECT_FALSE(daemon.server().Drained());

  const PutResult refused = PutAll(daemon.stub(), {{TensorHeader(1, "b", 0, 1), body}});
  EXPECT_EQ(refused.status.error_code(), StatusCode::UNAVAILABLE);
  grpc::ClientContext unary;
  v1::LookupRequest request;
  request.set_namespace_("model");
  v1::LookupResponse response;
  EXPECT_EQ(daemon.stub().Lookup(&unary, request, &response).error_code(), StatusCode::UNAVAILABLE);

  stream->Write(FrameOf<v1::PutRequest>(body.substr(100)));
  v1::PutResponse answer;
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.object_id(), 1U);
  EXPECT_EQ(answer.status().code(), 0);
  EXPECT_FALSE(stream->Read(&answer));
  EXPECT_EQ(stream->Finish().error_code(), StatusCode::UNAVAILABLE);
  EXPECT_TRUE(Eventually([&] { return daemon.server().Drained(); }));
}

TEST(Drain, ANewObjectOfAnOpenStreamIsRefusedByItsAnswer) {
  auto gate = std::make_shared<absl::Notification>();
  ServerParts parts;
  parts.backend = std::make_unique<GatedBackend>(gate);
  Daemon daemon(TestOptions(), std::move(parts));
  grpc::ClientContext context;
  auto stream = daemon.stub().Put(&context);
  const std::string body = MakeBody(kShape, 1);
  SendObject<PutClient, v1::PutRequest>(*stream, TensorHeader(1, "a", 0, 1), body);
  ASSERT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() > 0; }));
  absl::SleepFor(absl::Milliseconds(50));
  daemon.server().BeginDrain();
  v1::PutRequest header;
  *header.mutable_header() = TensorHeader(2, "b", 0, 1);
  stream->Write(header);
  v1::PutResponse answer;
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.object_id(), 2U);
  EXPECT_EQ(answer.status().code(), StatusCode::UNAVAILABLE);
  gate->Notify();
  ASSERT_TRUE(stream->Read(&answer));
  EXPECT_EQ(answer.object_id(), 1U);
  EXPECT_EQ(answer.status().code(), 0);
  EXPECT_FALSE(stream->Read(&answer));
  EXPECT_EQ(stream->Finish().error_code(), StatusCode::UNAVAILABLE);
}

TEST(Drain, IdleStreamsDoNotHoldItUp) {
  Daemon daemon;
  grpc::ClientContext put_context;
  auto put = daemon.stub().Put(&put_context);
  grpc::ClientContext get_context;
  auto get = daemon.stub().Get(&get_context);
  PutChunk(daemon, "a", 1, 1);  // by now both streams are open
  daemon.server().BeginDrain();
  EXPECT_TRUE(Eventually([&] { return daemon.server().Drained(); }));
  EXPECT_EQ(put->Finish().error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(get->Finish().error_code(), StatusCode::UNAVAILABLE);
}

TEST(Drain, StoppingCancelsWhatIsLeft) {
  grpc::ClientContext context;
  std::unique_ptr<PutClient> stream;
  std::unique_ptr<v1::KVShrink::Stub> stub;
  {
    Daemon daemon;
    stub = v1::KVShrink::NewStub(daemon.channel());
    stream = stub->Put(&context);
    SendObject<PutClient, v1::PutRequest>(*stream, TensorHeader(1, "a", 0, 1), "half");
    ASSERT_TRUE(Eventually([&] { return daemon.Info().inflight_bytes() > 0; }));
    daemon.server().BeginDrain();
  }
  v1::PutResponse answer;
  EXPECT_FALSE(stream->Read(&answer));
  EXPECT_FALSE(stream->Finish().ok());
}

TEST(Http, ServesMetricsAndProbes) {
  Options options = TestOptions();
  options.http = "127.0.0.1:0";
  Daemon daemon(options);
  const std::string http = daemon.server().http_address();
  PutChunk(daemon, "a", 1, 1);
  v1::PutHeader bad = TensorHeader(1, "a", 0, 0);
  PutAll(daemon.stub(), {{bad, ""}});
  const std::string metrics = HttpGet(http, "/metrics");
  EXPECT_THAT(metrics, StartsWith("HTTP/1.1 200"));
  for (const char* line :
       {"kvshrink_objects_total{code=\"OK\",rpc=\"Put\"} 1",
        "kvshrink_objects_total{code=\"INVALID_ARGUMENT\",rpc=\"Put\"} 1",
        "kvshrink_requests_total{code=\"OK\",rpc=\"Commit\"} 1",
        "kvshrink_encode_raw_bytes_total 32768",
        "kvshrink_encode_blocks_total{kind=\"k\",state=\"coded\"} 2",
        "kvshrink_body_bytes_total{direction=\"in\",rpc=\"Put\"} 32768",
        "kvshrink_object_seconds_count{rpc=\"Put\"} 2", "kvshrink_store_chunks 1",
        "kvshrink_draining 0", "kvshrink_store_capacity_bytes{tier=\"host\"} 1073741824"}) {
    EXPECT_THAT(metrics, HasSubstr(line));
  }
  EXPECT_THAT(HttpGet(http, "/healthz"), StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(HttpGet(http, "/readyz"), StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(HttpGet(http, "/other"), StartsWith("HTTP/1.1 404"));
  daemon.server().BeginDrain();
  EXPECT_THAT(HttpGet(http, "/healthz"), StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(HttpGet(http, "/readyz"), StartsWith("HTTP/1.1 503"));
  EXPECT_THAT(HttpGet(http, "/metrics"), HasSubstr("kvshrink_draining 1"));
}

TEST(Http, AnAddressInUseIsAClearError) {
  Options options = TestOptions();
  options.http = "127.0.0.1:0";
  Daemon daemon(options);
  options.http = daemon.server().http_address();
  const absl::Status status = Server::Start(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr(options.http));
}

}  // namespace
}  // namespace kvshrink::service::testing
