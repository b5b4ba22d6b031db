#include "kvshrink/client/remote.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "grpcpp/create_channel.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"

namespace kvshrink::client {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMaxMessageBytes = 16 << 20;  // a page of List, a Stat of 4096 layers
constexpr size_t kMaxChunksPerCall = 4096;
constexpr uint32_t kListPageSize = 1000;
constexpr int kReconnectMs = 100;  // before the second attempt, then longer
constexpr char kPushbackKey[] = "grpc-retry-pushback-ms";

// Milliseconds that the server asks to wait; 0: it doesn't want to be asked again.
int64_t PushbackMs(const grpc::ClientContext& context) {
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto found = metadata.find(kPushbackKey);
  int64_t wait_ms = 0;
  if (found == metadata.end() ||
      !absl::SimpleAtoi(absl::string_view(found->second.data(), found->second.size()), &wait_ms)) {
    return 0;
  }
  return std::clamp<int64_t>(wait_ms, 0, 10'000);
}

bool MayRetry(const grpc::Status& status) {
  return status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED ||
         status.error_code() == grpc::StatusCode::UNAVAILABLE;
}

// One unary call, tried again when the server says when.
template <typename Request, typename Response>
absl::StatusOr<Response> Call(v1::KVShrink::Stub* stub, const RemoteOptions& options,
                              grpc::Status (v1::KVShrink::Stub::*method)(grpc::ClientContext*,
                                                                         const Request&, Response*),
                              const Request& request) {
  const Clock::time_point give_up = Clock::now() + std::chrono::milliseconds(options.retry_for_ms);
  while (true) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::milliseconds(options.call_timeout_ms));
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (status.ok()) {
      return response;
    }
    const auto wait = std::chrono::milliseconds(MayRetry(status) ? PushbackMs(context) : 0);
    if (wait.count() == 0 || Clock::now() + wait > give_up) {
      return ToStatus(status, options.server);
    }
    std::this_thread::sleep_for(wait);
  }
}

// Runs a call that answers with a status per chunk, in calls of at most kMaxChunksPerCall.
template <typename Request, typename CallFn>
absl::StatusOr<std::vector<absl::Status>> CallPerChunk(const std::string& server,
                                                       const std::string& name_space,
                                                       const std::vector<std::string>& keys,
                                                       CallFn call) {
  std::vector<absl::Status> statuses;
  for (size_t first = 0; first < keys.size(); first += kMaxChunksPerCall) {
    const size_t count = std::min(kMaxChunksPerCall, keys.size() - first);
    Request request;
    for (size_t i = first; i < first + count; ++i) {
      v1::ChunkId* chunk = request.add_chunks();
      chunk->set_namespace_(name_space);
      chunk->set_key(keys[i]);
    }
    KVSHRINK_ASSIGN_OR_RETURN(const auto response, call(request));
    if (static_cast<size_t>(response.statuses_size()) != count) {
      return absl::DataLossError(StrCat("server ", server, ": field 'statuses' has ",
                                        response.statuses_size(), " entries: must have ", count));
    }
    for (const v1::ObjectStatus& status : response.statuses()) {
      statuses.push_back(ToStatus(status));
    }
  }
  return statuses;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Remote>> Remote::Create(const RemoteOptions& options) {
  if (options.server.empty()) {
    return BadArgument("server", "''", "must be host:port");
  }
  const std::pair<const char*, int64_t> timeouts[] = {
      {"connect_timeout_ms", options.connect_timeout_ms},
      {"call_timeout_ms", options.call_timeout_ms},
      {"idle_timeout_ms", options.idle_timeout_ms}};
  for (const auto& [name, value] : timeouts) {
    if (value < 1) {
      return BadArgument(name, value, "must be at least 1");
    }
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMs);
  const auto channel =
      grpc::CreateCustomChannel(options.server, grpc::InsecureChannelCredentials(), arguments);
  // A connection that fails once, as while the daemon starts, is tried again; the calls themselves
  // fail at once when there is none, and their error says why.
  channel->WaitForConnected(std::chrono::system_clock::now() +
                            std::chrono::milliseconds(options.connect_timeout_ms));
  return std::unique_ptr<Remote>(new Remote(options, v1::KVShrink::NewStub(channel)));
}

Remote::Remote(RemoteOptions options, std::unique_ptr<v1::KVShrink::Stub> stub)
    : options_(std::move(options)), stub_(std::move(stub)) {}

absl::StatusOr<v1::ServerInfoResponse> Remote::Info() {
  return Call(stub_.get(), options_, &v1::KVShrink::Stub::ServerInfo, v1::ServerInfoRequest());
}

absl::StatusOr<v1::LookupResponse> Remote::Lookup(const std::string& name_space,
                                                  const std::vector<std::string>& keys,
                                                  uint32_t lease_ms) {
  v1::LookupRequest request;
  request.set_namespace_(name_space);
  request.set_lease_ms(lease_ms);
  for (const std::string& key : keys) {
    request.add_keys(key);
  }
  auto response = Call(stub_.get(), options_, &v1::KVShrink::Stub::Lookup, request);
  if (response.ok() && response->present() > keys.size()) {
    return absl::DataLossError(StrCat("server ", options_.server, ": field 'present' is ",
                                      response->present(), ": only ", keys.size(),
                                      " keys were asked for"));
  }
  return response;
}

absl::StatusOr<v1::ReleaseResponse> Remote::Release(uint64_t lease_id) {
  v1::ReleaseRequest request;
  request.set_lease_id(lease_id);
  return Call(stub_.get(), options_, &v1::KVShrink::Stub::Release, request);
}

absl::StatusOr<std::vector<absl::Status>> Remote::Commit(const std::string& name_space,
                                                         const std::vector<std::string>& keys) {
  return CallPerChunk<v1::CommitRequest>(
      options_.server, name_space, keys, [this](const v1::CommitRequest& request) {
        return Call(stub_.get(), options_, &v1::KVShrink::Stub::Commit, request);
      });
}

absl::StatusOr<std::vector<absl::Status>> Remote::Delete(const std::string& name_space,
                                                         const std::vector<std::string>& keys) {
  return CallPerChunk<v1::DeleteRequest>(
      options_.server, name_space, keys, [this](const v1::DeleteRequest& request) {
        return Call(stub_.get(), options_, &v1::KVShrink::Stub::Delete, request);
      });
}

absl::StatusOr<v1::StatResponse> Remote::Stat(const std::string& name_space,
                                              const std::string& key) {
  v1::StatRequest request;
  request.mutable_chunk()->set_namespace_(name_space);
  request.mutable_chunk()->set_key(key);
  return Call(stub_.get(), options_, &v1::KVShrink::Stub::Stat, request);
}

absl::Status Remote::List(const std::string& name_space,
                          const std::function<absl::Status(const v1::ChunkInfo&)>& visit) {
  v1::ListRequest request;
  request.set_namespace_(name_space);
  request.set_page_size(kListPageSize);
  while (true) {
    KVSHRINK_ASSIGN_OR_RETURN(const v1::ListResponse page,
                              Call(stub_.get(), options_, &v1::KVShrink::Stub::List, request));
    for (const v1::ChunkInfo& chunk : page.chunks()) {
      KVSHRINK_RETURN_IF_ERROR(visit(chunk));
    }
    if (page.next_page_token().empty()) {
      return absl::OkStatus();
    }
    if (page.next_page_token() == request.page_token()) {
      return absl::DataLossError(
          StrCat("server ", options_.server, ": field 'next_page_token' doesn't move on"));
    }
    request.set_page_token(page.next_page_token());
  }
}

std::unique_ptr<PutStream> Remote::Put(PutStream::OnAnswer on_answer) {
  return std::make_unique<PutStream>(stub_.get(), options_, std::move(on_answer));
}

}  // namespace kvshrink::client
