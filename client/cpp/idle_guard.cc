#include "idle_guard.h"

namespace kvshrink::client {

IdleGuard::IdleGuard(grpc::ClientContext* context, int64_t idle_timeout_ms)
    : context_(context), timeout_(idle_timeout_ms), watcher_([this] { Watch(); }) {}

IdleGuard::~IdleGuard() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  watcher_.join();
}

void IdleGuard::Arm() {
  const std::lock_guard lock(mutex_);
  deadline_ = Clock::now() + timeout_;
  if (asleep_) {
    changed_.notify_all();
  }
}

void IdleGuard::Disarm() {
  // The watcher sees it, and a later Arm, when its wait is over; waking it here would cost a switch
  // per message.
  const std::lock_guard lock(mutex_);
  deadline_.reset();
}

void IdleGuard::Expire() {
  {
    const std::lock_guard lock(mutex_);
    expired_ = true;
  }
  context_->TryCancel();
}

bool IdleGuard::expired() {
  const std::lock_guard lock(mutex_);
  return expired_;
}

void IdleGuard::Watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (!deadline_) {
      asleep_ = true;
      changed_.wait(lock);
      asleep_ = false;
    } else if (Clock::now() < *deadline_) {
      const Clock::time_point deadline = *deadline_;  // a wait keeps a reference
      changed_.wait_until(lock, deadline);
    } else {
      deadline_.reset();
      expired_ = true;
      context_->TryCancel();
    }
  }
}

}  // namespace kvshrink::client
