// kvshrinkd: settings in, serve until SIGTERM or SIGINT, drain, exit. Exits 0 after a drain, 1 when
// it can't serve, 2 for bad usage.

#include <grpc/support/log.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <cstdio>
#include <memory>
#include <string>
#include <variant>

#include "absl/time/clock.h"
#include "kvshrink/strcat.h"
#include "service/observe/log.h"
#include "service/observe/state.h"
#include "service/options.h"
#include "service/port_file.h"
#include "service/server.h"
#include "service/version.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {
namespace {

std::string TierNames(const store::Store& store) {
  std::string names;
  for (const store::TierUsage& usage : store.Usage()) {
    names += StrCat(names.empty() ? "" : ",", TierLabel(usage.tier));
  }
  return names;
}

// gRPC's own complaints, as lines of our log.
void LogGrpc(gpr_log_func_args* args) {
  const spdlog::level::level_enum level =
      args->severity == GPR_LOG_SEVERITY_ERROR ? spdlog::level::warn : spdlog::level::debug;
  spdlog::log(level, "grpc message=\"{}\"", Printable(args->message));
}

// Waits until admitted work is done, the time is over, or a second signal says that it is.
void AwaitDrain(const Server& server, const sigset_t& signals, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  constexpr timespec kPoll = {0, 20'000'000};
  while (!server.Drained()) {
    if (absl::Now() >= deadline) {
      spdlog::warn("drain_timeout seconds={}", absl::ToDoubleSeconds(timeout));
      return;
    }
    if (sigtimedwait(&signals, nullptr, &kPoll) > 0) {
      spdlog::warn("drain_cut_short");
      return;
    }
  }
}

int Run(const Options& options) {
  // Blocked before any thread starts, so that only the wait below sees them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  gpr_set_log_function(LogGrpc);

  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(options);
  absl::Status status = server.status();
  if (status.ok() && !options.port_file.empty()) {
    status =
        WritePortFile(options.port_file, (*server)->listen_address(), (*server)->http_address());
  }
  if (!status.ok()) {
    spdlog::error("start_failed error=\"{}\"", status.ToString());
    return 1;
  }
  spdlog::info(
      "serving version={} listen={} http={} backend={} device=\"{}\" tiers={} data_dir=\"{}\"",
      kVersion, (*server)->listen_address(),
      options.http.empty() ? "off" : (*server)->http_address(), (*server)->codec().backend(),
      (*server)->codec().device(), TierNames((*server)->store()), options.data_dir);

  int signal_number = 0;
  sigwait(&signals, &signal_number);
  spdlog::info("draining signal={}", signal_number);
  (*server)->BeginDrain();
  AwaitDrain(**server, signals, absl::Seconds(options.drain_timeout_s));
  server->reset();
  spdlog::info("stopped");
  return 0;
}

int Main(int argc, const char* const* argv) {
  const std::variant<Options, EarlyExit> parsed = ParseOptions(argc, argv);
  if (const EarlyExit* early = std::get_if<EarlyExit>(&parsed)) {
    std::fprintf(early->code == 0 ? stdout : stderr, "%s\n", early->text.c_str());
    return early->code;
  }
  const Options& options = std::get<Options>(parsed);
  if (absl::Status status = SetUpLog(options.log_level); !status.ok()) {
    std::fprintf(stderr, "kvshrinkd: %s\n", std::string(status.message()).c_str());
    return 2;
  }
  return Run(options);
}

}  // namespace
}  // namespace kvshrink::service

int main(int argc, char** argv) { return kvshrink::service::Main(argc, argv); }
