#include "service/engine/admission.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvshrink::service {
namespace {

constexpr double kAverageWeight = 0.1;  // of the newest ticket in the moving average
constexpr double kMinRetryMs = 20;
constexpr double kMaxRetryMs = 5000;

}  // namespace

Ticket::Ticket(Admission* admission, uint64_t bytes)
    : admission_(admission), bytes_(bytes), since_(absl::Now()) {}

Ticket::Ticket(Ticket&& other) noexcept
    : admission_(std::exchange(other.admission_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      since_(other.since_) {}

Ticket& Ticket::operator=(Ticket&& other) noexcept {
  if (this != &other) {
    Release();
    admission_ = std::exchange(other.admission_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    since_ = other.since_;
  }
  return *this;
}

Ticket::~Ticket() { Release(); }

void Ticket::Release() {
  if (admission_ != nullptr) {
    admission_->GiveBack(bytes_, absl::Now() - since_);
    admission_ = nullptr;
    bytes_ = 0;
  }
}

absl::Status Ticket::GrowTo(uint64_t bytes) {
  if (bytes <= bytes_) {
    return absl::OkStatus();
  }
  absl::Status status = admission_->Take(bytes - bytes_, 0);
  if (status.ok()) {
    bytes_ = bytes;
  }
  return status;
}

Admission::Admission(uint64_t capacity_bytes, uint64_t capacity_tickets)
    : capacity_bytes_(capacity_bytes), capacity_tickets_(capacity_tickets) {}

absl::StatusOr<Ticket> Admission::Admit(uint64_t bytes) {
  if (absl::Status status = Take(bytes, 1); !status.ok()) {
    return status;
  }
  return Ticket(this, bytes);
}

absl::Status Admission::Take(uint64_t bytes, uint64_t tickets) {
  absl::MutexLock lock(&mu_);
  if (bytes > capacity_bytes_ - bytes_) {
    ++refused_;
    if (bytes > capacity_bytes_) {
      return absl::ResourceExhaustedError(
          absl::StrCat("needs ", bytes, " bytes of memory: more than all ", capacity_bytes_,
                       " of this server (--inflight-bytes)"));
    }
    return absl::ResourceExhaustedError(absl::StrCat("needs ", bytes,
                                                     " bytes of memory: ", capacity_bytes_ - bytes_,
                                                     " of ", capacity_bytes_, " are free"));
  }
  if (tickets > capacity_tickets_ - tickets_) {
    ++refused_;
    return absl::ResourceExhaustedError(
        absl::StrCat("all ", capacity_tickets_, " places for work in progress are taken"));
  }
  bytes_ += bytes;
  tickets_ += tickets;
  return absl::OkStatus();
}

void Admission::GiveBack(uint64_t bytes, absl::Duration held) {
  absl::MutexLock lock(&mu_);
  bytes_ -= bytes;
  --tickets_;
  held_ms_ += kAverageWeight * (absl::ToDoubleMilliseconds(held) - held_ms_);
}

uint32_t Admission::retry_after_ms() const {
  absl::MutexLock lock(&mu_);
  return static_cast<uint32_t>(std::clamp(held_ms_, kMinRetryMs, kMaxRetryMs));
}

uint64_t Admission::inflight_bytes() const {
  absl::MutexLock lock(&mu_);
  return bytes_;
}

uint64_t Admission::inflight_tickets() const {
  absl::MutexLock lock(&mu_);
  return tickets_;
}

uint64_t Admission::refused() const {
  absl::MutexLock lock(&mu_);
  return refused_;
}

}  // namespace kvshrink::service
