// A server whose answers a test scripts, and the client that speaks to it.
#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "kvshrink/client/remote.h"

namespace kvshrink::client {

using PutServerStream = grpc::ServerReaderWriter<v1::PutResponse, v1::PutRequest>;
using GetServerStream = grpc::ServerReaderWriter<v1::GetResponse, v1::GetRequest>;
using AttendServerStream = grpc::ServerReaderWriter<v1::AttendResponse, v1::AttendRequest>;

// A server whose answers are the test's.
class ScriptedService : public v1::KVShrink::Service {
 public:
  std::function<grpc::Status(grpc::ServerContext*, PutServerStream*)> put;
  std::function<grpc::Status(grpc::ServerContext*, GetServerStream*)> get;
  std::function<grpc::Status(grpc::ServerContext*, AttendServerStream*)> attend;
  std::function<grpc::Status(grpc::ServerContext*, v1::ServerInfoResponse*)> info;
  std::function<void(const v1::CommitRequest&, v1::CommitResponse*)> commit;
  std::function<void(const v1::ListRequest&, v1::ListResponse*)> list;

  grpc::Status Put(grpc::ServerContext* context, PutServerStream* stream) override {
    return put(context, stream);
  }
  grpc::Status Get(grpc::ServerContext* context, GetServerStream* stream) override {
    return get(context, stream);
  }
  grpc::Status Attend(grpc::ServerContext* context, AttendServerStream* stream) override {
    return attend(context, stream);
  }
  grpc::Status ServerInfo(grpc::ServerContext* context, const v1::ServerInfoRequest*,
                          v1::ServerInfoResponse* response) override {
    return info(context, response);
  }
  grpc::Status Commit(grpc::ServerContext*, const v1::CommitRequest* request,
                      v1::CommitResponse* response) override {
    commit(*request, response);
    return grpc::Status::OK;
  }
  grpc::Status List(grpc::ServerContext*, const v1::ListRequest* request,
                    v1::ListResponse* response) override {
    list(*request, response);
    return grpc::Status::OK;
  }
};

class RemoteTest : public ::testing::Test {
 protected:
  RemoteTest() {
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    options_.server = "127.0.0.1:" + std::to_string(port);
    options_.idle_timeout_ms = 10'000;
  }
  ~RemoteTest() override { server_->Shutdown(std::chrono::system_clock::now()); }

  std::unique_ptr<Remote> Connect() { return *Remote::Create(options_); }

  ScriptedService service_;
  std::unique_ptr<grpc::Server> server_;
  RemoteOptions options_;
};

}  // namespace kvshrink::client
