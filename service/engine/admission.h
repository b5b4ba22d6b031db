// Admission: what the daemon has promised to hold in memory at once, and nothing beyond it.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace kvshrink::service {

class Admission;

// A share of the budget; given back when destroyed. Movable, owned by whoever holds the memory it
// stands for.
class Ticket {
 public:
  Ticket() = default;
  Ticket(Ticket&& other) noexcept;
  Ticket& operator=(Ticket&& other) noexcept;
  ~Ticket();

  bool held() const { return admission_ != nullptr; }
  uint64_t bytes() const { return bytes_; }

  // Raises the share to `bytes` (a smaller value changes nothing). RESOURCE_EXHAUSTED leaves it as
  // it was.
  absl::Status GrowTo(uint64_t bytes);

 private:
  friend class Admission;
  Ticket(Admission* admission, uint64_t bytes);
  void Release();

  Admission* admission_ = nullptr;
  uint64_t bytes_ = 0;
  absl::Time since_;
};

// Thread-safe. Never waits: a request that doesn't fit is refused at once, so nothing queues
// without bound.
class Admission {
 public:
  // At most `capacity_bytes` and `capacity_tickets` at a time. A ticket stands for at most one job
  // of the executor at a time.
  Admission(uint64_t capacity_bytes, uint64_t capacity_tickets);

  // RESOURCE_EXHAUSTED naming what was asked and what is free.
  absl::StatusOr<Ticket> Admit(uint64_t bytes);

  // When a refused caller should come back: about how long an admitted object lately took.
  uint32_t retry_after_ms() const;

  uint64_t capacity_bytes() const { return capacity_bytes_; }
  uint64_t capacity_tickets() const { return capacity_tickets_; }
  uint64_t inflight_bytes() const;
  uint64_t inflight_tickets() const;
  uint64_t refused() const;

 private:
  friend class Ticket;
  absl::Status Take(uint64_t bytes, uint64_t tickets);
  void GiveBack(uint64_t bytes, absl::Duration held);

  const uint64_t capacity_bytes_;
  const uint64_t capacity_tickets_;
  mutable absl::Mutex mu_;
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t tickets_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t refused_ ABSL_GUARDED_BY(mu_) = 0;
  double held_ms_ ABSL_GUARDED_BY(mu_) = 0;  // moving average
};

}  // namespace kvshrink::service
