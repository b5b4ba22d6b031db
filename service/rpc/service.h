// kvshrink.v1.KVShrink: which class answers which RPC.
#pragma once

#include <grpcpp/grpcpp.h>

#include "kvshrink/v1/kvshrink.grpc.pb.h"
#include "service/rpc/environment.h"

namespace kvshrink::service {

class Service final : public v1::KVShrink::CallbackService {
 public:
  // `env` must outlive the server that the service is registered with.
  explicit Service(Environment& env) : env_(env) {}

  grpc::ServerBidiReactor<v1::PutRequest, v1::PutResponse>* Put(
      grpc::CallbackServerContext* context) override;
  grpc::ServerBidiReactor<v1::GetRequest, v1::GetResponse>* Get(
      grpc::CallbackServerContext* context) override;
  grpc::ServerBidiReactor<v1::AttendRequest, v1::AttendResponse>* Attend(
      grpc::CallbackServerContext* context) override;
  grpc::ServerBidiReactor<v1::CompressRequest, v1::CompressResponse>* Compress(
      grpc::CallbackServerContext* context) override;
  grpc::ServerBidiReactor<v1::DecompressRequest, v1::DecompressResponse>* Decompress(
      grpc::CallbackServerContext* context) override;

  grpc::ServerUnaryReactor* Lookup(grpc::CallbackServerContext* context,
                                   const v1::LookupRequest* request,
                                   v1::LookupResponse* response) override;
  grpc::ServerUnaryReactor* Commit(grpc::CallbackServerContext* context,
                                   const v1::CommitRequest* request,
                                   v1::CommitResponse* response) override;
  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context,
                                    const v1::ReleaseRequest* request,
                                    v1::ReleaseResponse* response) override;
  grpc::ServerUnaryReactor* Delete(grpc::CallbackServerContext* context,
                                   const v1::DeleteRequest* request,
                                   v1::DeleteResponse* response) override;
  grpc::ServerUnaryReactor* Stat(grpc::CallbackServerContext* context,
                                 const v1::StatRequest* request,
                                 v1::StatResponse* response) override;
  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context,
                                 const v1::ListRequest* request,
                                 v1::ListResponse* response) override;
  grpc::ServerUnaryReactor* ServerInfo(grpc::CallbackServerContext* context,
                                       const v1::ServerInfoRequest* request,
                                       v1::ServerInfoResponse* response) override;

 private:
  Environment& env_;
};

}  // namespace kvshrink::service
