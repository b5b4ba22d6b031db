#include "service/rpc/service.h"

#include <memory>
#include <string_view>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "service/rpc/attend.h"
#include "service/rpc/compress.h"
#include "service/rpc/convert.h"
#include "service/rpc/get.h"
#include "service/rpc/put.h"
#include "service/rpc/tenant.h"
#include "service/rpc/unary.h"

namespace kvshrink::service {
namespace {

template <class Stream>
Stream* Open(Environment& env, grpc::CallbackServerContext* context) {
  auto stream = std::make_shared<Stream>(env, context);
  stream->Begin();
  return stream.get();
}

// What a client's retry policy reads (gRPC retry design, "server pushback").
constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";

// A context has one default reactor and gives it out once.
void Finish(Environment& env, grpc::CallbackServerContext* context,
            grpc::ServerUnaryReactor* reactor, std::string_view rpc, const absl::Status& status) {
  if (absl::IsResourceExhausted(status)) {
    context->AddTrailingMetadata(kPushbackKey, std::to_string(env.admission->retry_after_ms()));
  }
  env.metrics->RequestDone(rpc, status.code());
  reactor->Finish(ToGrpc(status));
}

// Answers on an executor's thread, since all of these may wait for the store. A place in the
// executor is admitted first, so that a flood of calls is refused and not queued.
grpc::ServerUnaryReactor* Answer(Environment& env, grpc::CallbackServerContext* context,
                                 std::string_view rpc, absl::AnyInvocable<absl::Status()> body) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const auto finish = [&env, context, reactor, rpc](const absl::Status& status) {
    Finish(env, context, reactor, rpc, status);
  };
  if (env.draining) {
    finish(absl::UnavailableError("the daemon is draining"));
    return reactor;
  }
  absl::StatusOr<Ticket> ticket = env.admission->Admit(0);
  if (!ticket.ok()) {
    finish(ticket.status());
    return reactor;
  }
  const bool taken =
      env.executor->Submit([finish, body = std::move(body), held = *std::move(ticket)]() mutable {
        const absl::Status status = body();
        held = Ticket();  // a client that has its answer finds its place free
        finish(status);
      });
  if (!taken) {
    finish(absl::ResourceExhaustedError("the queue of jobs is full"));
  }
  return reactor;
}

}  // namespace

grpc::ServerBidiReactor<v1::PutRequest, v1::PutResponse>* Service::Put(
    grpc::CallbackServerContext* context) {
  return Open<PutStream>(env_, context);
}

grpc::ServerBidiReactor<v1::GetRequest, v1::GetResponse>* Service::Get(
    grpc::CallbackServerContext* context) {
  return Open<GetStream>(env_, context);
}

grpc::ServerBidiReactor<v1::AttendRequest, v1::AttendResponse>* Service::Attend(
    grpc::CallbackServerContext* context) {
  return Open<AttendStream>(env_, context);
}

grpc::ServerBidiReactor<v1::CompressRequest, v1::CompressResponse>* Service::Compress(
    grpc::CallbackServerContext* context) {
  return Open<CompressStream>(env_, context);
}

grpc::ServerBidiReactor<v1::DecompressRequest, v1::DecompressResponse>* Service::Decompress(
    grpc::CallbackServerContext* context) {
  return Open<DecompressStream>(env_, context);
}

grpc::ServerUnaryReactor* Service::Lookup(grpc::CallbackServerContext* context,
                                          const v1::LookupRequest* request,
                                          v1::LookupResponse* response) {
  return Answer(env_, context, "Lookup", [this, tenant = TenantOf(*context), request, response] {
    return DoLookup(env_, tenant, *request, response);
  });
}

grpc::ServerUnaryReactor* Service::Commit(grpc::CallbackServerContext* context,
                                          const v1::CommitRequest* request,
                                          v1::CommitResponse* response) {
  return Answer(
      env_, context, "Commit", [this, context, tenant = TenantOf(*context), request, response] {
        return DoCommit(
            env_, tenant, [context] { return context->IsCancelled(); }, *request, response);
      });
}

grpc::ServerUnaryReactor* Service::Release(grpc::CallbackServerContext* context,
                                           const v1::ReleaseRequest* request,
                                           v1::ReleaseResponse* response) {
  return Answer(env_, context, "Release", [this, tenant = TenantOf(*context), request, response] {
    response->set_released(env_.store->Release(tenant, request->lease_id()));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* Service::Delete(grpc::CallbackServerContext* context,
                                          const v1::DeleteRequest* request,
                                          v1::DeleteResponse* response) {
  return Answer(
      env_, context, "Delete", [this, context, tenant = TenantOf(*context), request, response] {
        return DoDelete(
            env_, tenant, [context] { return context->IsCancelled(); }, *request, response);
      });
}

grpc::ServerUnaryReactor* Service::Stat(grpc::CallbackServerContext* context,
                                        const v1::StatRequest* request,
                                        v1::StatResponse* response) {
  return Answer(env_, context, "Stat", [this, tenant = TenantOf(*context), request, response] {
    return DoStat(env_, tenant, *request, response);
  });
}

grpc::ServerUnaryReactor* Service::List(grpc::CallbackServerContext* context,
                                        const v1::ListRequest* request,
                                        v1::ListResponse* response) {
  return Answer(env_, context, "List", [this, tenant = TenantOf(*context), request, response] {
    return DoList(env_, tenant, *request, response);
  });
}

// Answers while draining and under load too: it is how an operator sees both.
grpc::ServerUnaryReactor* Service::ServerInfo(grpc::CallbackServerContext* context,
                                              const v1::ServerInfoRequest* /*request*/,
                                              v1::ServerInfoResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  FillServerInfo(env_, response);
  Finish(env_, context, reactor, "ServerInfo", absl::OkStatus());
  return reactor;
}

}  // namespace kvshrink::service
