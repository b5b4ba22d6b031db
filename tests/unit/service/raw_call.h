// Calls of services whose messages have no generated code here (health, reflection): bytes out,
// bytes in.
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <memory>
#include <optional>
#include <string>

namespace kvshrink::service::testing {

// A bidirectional (or server-streaming, or unary) call, one message at a time.
class RawCall {
 public:
  // method: "/grpc.health.v1.Health/Watch".
  RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method);
  ~RawCall();

  void Write(const std::string& message);
  // nullopt: the stream has ended, or nothing came for ten seconds.
  std::optional<std::string> Read();

 private:
  bool Next();

  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

// A HealthCheckRequest for `service`.
std::string HealthRequest(const std::string& service);
// HealthCheckResponse with status SERVING (1) or NOT_SERVING (2).
inline constexpr char kServing[] = "\x08\x01";
inline constexpr char kNotServing[] = "\x08\x02";

}  // namespace kvshrink::service::testing
