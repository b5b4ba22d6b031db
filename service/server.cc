#include "service/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <thread>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "service/engine/cuda_codec.h"
#include "service/observe/address.h"
#include "service/observe/http.h"
#include "service/observe/state.h"
#include "service/rpc/limits.h"
#include "service/rpc/service.h"
#include "service/version.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {
namespace {

constexpr char kServiceName[] = "kvshrink.v1.KVShrink";
constexpr uint64_t kMaxTickets = 4096;  // objects, requests and unary calls in progress
constexpr int kMaxStreamsPerConnection = 256;
constexpr int kKeepaliveMs = 30'000;
constexpr int kKeepaliveTimeoutMs = 10'000;
constexpr int kMinClientPingMs = 5'000;
constexpr absl::Duration kTickInterval = absl::Seconds(1);
// For health watchers and idle calls, once all work is done.
constexpr absl::Duration kShutdownGrace = absl::Milliseconds(100);

std::string CpuName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "unknown CPU";
}

int ThreadCount(int asked) {
  return asked > 0 ? asked : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls `tick` each second until destroyed.
class Clock {
 public:
  explicit Clock(std::function<void()> tick) : tick_(std::move(tick)), thread_([this] { Run(); }) {}
  ~Clock() {
    stop_.Notify();
    thread_.join();
  }

 private:
  void Run() {
    while (!stop_.WaitForNotificationWithTimeout(kTickInterval)) {
      tick_();
    }
  }

  std::function<void()> tick_;
  absl::Notification stop_;
  std::thread thread_;  // last: starts when the rest is there
};

class GrpcDaemon final : public Server {
 public:
  GrpcDaemon(const Options& options, ServerParts parts, BasisSet bases)
      : options_(options),
        store_(std::move(parts.store)),
        backend_(std::move(parts.backend)),
        bases_(std::move(bases)),
        codec_(std::move(parts.codec)),
        admission_(options.inflight_bytes, kMaxTickets),
        metrics_(kVersion, codec_->backend()),
        executor_(std::make_unique<Executor>(ThreadCount(options.threads), kMaxTickets)),
        service_(env_) {
    env_.store = store_.get();
    env_.backend = backend_.get();
    env_.bases = &bases_;
    env_.codec = codec_.get();
    env_.admission = &admission_;
    env_.executor = executor_.get();
    env_.metrics = &metrics_;
    env_.streams = &streams_;
    env_.max_object_bytes = options.max_object_bytes;
    env_.uncommitted_capacity_bytes = options.uncommitted_bytes;
    env_.version = kVersion;
    env_.device = codec_->device().empty() ? CpuName() : codec_->device();
  }

  ~GrpcDaemon() override {
    clock_.reset();
    if (server_ != nullptr) {
      server_->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownGrace));
      server_->Wait();
    }
    http_.reset();
    executor_.reset();  // runs out what calls have left behind, before what it works with goes
  }

  absl::Status Serve() {
    KVSHRINK_RETURN_IF_ERROR(ServeGrpc());
    if (!options_.http.empty()) {
      HttpHooks hooks{.metrics = [this] { return CollectMetrics(); },
                      .ready = [this] { return !env_.draining; }};
      absl::StatusOr<std::unique_ptr<HttpServer>> http =
          HttpServer::Start(options_.http, std::move(hooks));
      if (!http.ok()) {
        return http.status();
      }
      http_ = *std::move(http);
      http_address_ = http_->address();
    }
    clock_ = std::make_unique<Clock>([this] { Tick(); });
    return absl::OkStatus();
  }

  const std::string& listen_address() const override { return listen_address_; }
  const std::string& http_address() const override { return http_address_; }

  void BeginDrain() override {
    server_->GetHealthCheckService()->SetServingStatus(false);
    env_.draining = true;
    streams_.Drain();
  }

  bool Drained() const override {
    return streams_.size() == 0 && admission_.inflight_tickets() == 0;
  }

  store::Store& store() override { return *store_; }
  const Codec& codec() const override { return *codec_; }

 private:
  absl::Status ServeGrpc() {
    absl::StatusOr<HostPort> at = HostPort::Parse("listen", options_.listen);
    if (!at.ok()) {
      return at.status();
    }
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(options_.listen, grpc::InsecureServerCredentials(), &port);
    // Two daemons on one port would share its connections, each with a store of its own.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsPerConnection);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               kMinClientPingMs);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port == 0) {
      return absl::UnavailableError(StrCat("listen: can't listen on ", options_.listen));
    }
    server_->GetHealthCheckService()->SetServingStatus(kServiceName, true);
    listen_address_ = HostPort{at->host, port}.ToString();
    return absl::OkStatus();
  }

  void Tick() {
    store_->Tick();
    streams_.CutOffStalled(absl::Now(), absl::Seconds(options_.stall_timeout_s));
  }

  std::vector<prometheus::MetricFamily> CollectMetrics() const {
    std::vector<prometheus::MetricFamily> families = metrics_.Collect();
    const DaemonState state{.inflight_bytes = admission_.inflight_bytes(),
                            .inflight_capacity_bytes = admission_.capacity_bytes(),
                            .inflight_objects = admission_.inflight_tickets(),
                            .refused = admission_.refused(),
                            .queued_jobs = executor_->queued(),
                            .open_streams = streams_.size(),
                            .draining = env_.draining,
                            .has_device = codec_->health().has_device,
                            .device_lost = codec_->health().lost};
    for (prometheus::MetricFamily& family : StateMetrics(state, *store_)) {
      families.push_back(std::move(family));
    }
    return families;
  }

  const Options options_;
  std::unique_ptr<store::Store> store_;
  std::unique_ptr<Backend> backend_;
  const BasisSet bases_;
  std::unique_ptr<Codec> codec_;
  Admission admission_;
  Metrics metrics_;
  StreamRegistry streams_;
  std::unique_ptr<Executor> executor_;
  Environment env_;
  Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<Clock> clock_;
  std::string listen_address_;
  std::string http_address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Options& options, ServerParts parts) {
  KVSHRINK_RETURN_IF_ERROR(ValidateOptions(options));
  absl::StatusOr<BasisSet> bases = BasisSet::Load(options.bases);
  if (!bases.ok()) {
    return bases.status();
  }
  if (parts.backend == nullptr) {
    parts.backend = MakeCpuBackend(options.threads);
  }
  if (parts.codec == nullptr) {
    const CudaCodecOptions cuda{.device_bytes = options.device_bytes,
                                .lanes = ThreadCount(options.threads)};
    absl::StatusOr<std::unique_ptr<Codec>> codec =
        ChooseCodec(options.backend, cuda, *parts.backend);
    if (!codec.ok()) {
      return codec.status();
    }
    parts.codec = *std::move(codec);
  }
  if (parts.store == nullptr) {
    store::StoreOptions store_options;
    store_options.data_dir = options.data_dir;
    store_options.host_bytes = options.host_bytes;
    store_options.disk_bytes = options.disk_bytes;
    store_options.uncommitted_bytes = options.uncommitted_bytes;
    store_options.uncommitted_ttl_ms = int64_t{options.uncommitted_ttl_s} * 1000;
    absl::StatusOr<std::unique_ptr<store::Store>> store = store::Store::Open(store_options);
    if (!store.ok()) {
      return store.status();
    }
    parts.store = *std::move(store);
  }
  auto server = std::make_unique<GrpcDaemon>(options, std::move(parts), *std::move(bases));
  KVSHRINK_RETURN_IF_ERROR(server->Serve());
  return server;
}

}  // namespace kvshrink::service
