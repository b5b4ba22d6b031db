// Cancels a call whose peer makes no progress: a blocking read or write has no timeout of its own.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <thread>

#include "grpcpp/client_context.h"

namespace kvshrink::client {

class IdleGuard {
 public:
  // Neither owned; `context` must outlive the guard.
  IdleGuard(grpc::ClientContext* context, int64_t idle_timeout_ms);
  ~IdleGuard();

  // From Arm to Disarm, no more than the timeout may pass.
  void Arm();
  void Disarm();
  // Cancels now, as if the time had passed.
  void Expire();
  bool expired();

 private:
  using Clock = std::chrono::steady_clock;
  void Watch();

  grpc::ClientContext* context_;
  std::chrono::milliseconds timeout_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Clock::time_point> deadline_;
  bool expired_ = false;
  bool stopping_ = false;
  bool asleep_ = false;  // the watcher waits without an end
  std::thread watcher_;
};

// Arms for a scope.
class ArmedScope {
 public:
  explicit ArmedScope(IdleGuard* guard) : guard_(guard) { guard_->Arm(); }
  ~ArmedScope() { guard_->Disarm(); }
  ArmedScope(const ArmedScope&) = delete;
  ArmedScope& operator=(const ArmedScope&) = delete;

 private:
  IdleGuard* guard_;
};

}  // namespace kvshrink::client
