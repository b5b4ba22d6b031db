#include "kvshrink/client/put_stream.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "idle_guard.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"

namespace kvshrink::client {
namespace {

// A peer's word on when to come back, within reason.
constexpr uint32_t kMinRetryMs = 1;
constexpr uint32_t kMaxRetryMs = 10'000;

}  // namespace

uint64_t PutObject::body_bytes() const {
  uint64_t bytes = 0;
  for (const std::string_view part : parts) {
    bytes += part.size();
  }
  return bytes;
}

PutStream::PutStream(Stub* stub, const RemoteOptions& options, OnAnswer on_answer)
    : options_(options), on_answer_(std::move(on_answer)) {
  if (options_.stream_timeout_ms > 0) {
    context_.set_deadline(std::chrono::system_clock::now() +
                          std::chrono::milliseconds(options_.stream_timeout_ms));
  }
  guard_ = std::make_unique<IdleGuard>(&context_, options_.idle_timeout_ms);
  stream_ = stub->Put(&context_);
  reader_ = std::thread([this] { ReadAnswers(); });
}

PutStream::~PutStream() {
  if (!ended_) {
    Fail(absl::CancelledError("the stream was not finished")).IgnoreError();
  }
}

void PutStream::ReadAnswers() {
  v1::PutResponse answer;
  while (stream_->Read(&answer)) {
    {
      const std::lock_guard lock(mutex_);
      answers_.push_back(std::move(answer));
    }
    changed_.notify_all();
  }
  {
    const std::lock_guard lock(mutex_);
    reading_ = false;
  }
  changed_.notify_all();
}

absl::Status PutStream::Send(PutObject object) {
  if (ended_) {
    return ended_->ok() ? absl::FailedPreconditionError("the stream is finished") : *ended_;
  }
  const uint64_t bytes = object.body_bytes();
  KVSHRINK_RETURN_IF_ERROR(TakeAnswers());
  while (!pending_.empty() && pending_bytes_ + bytes > options_.inflight_bytes) {
    KVSHRINK_RETURN_IF_ERROR(Step());
  }
  KVSHRINK_RETURN_IF_ERROR(SendDue());
  const uint64_t id = next_object_id_++;
  object.header.set_object_id(id);
  object.header.set_body_bytes(bytes);
  pending_bytes_ += bytes;
  Pending& pending = pending_[id];
  pending.object = std::move(object);
  return Write(pending.object);
}

absl::Status PutStream::Finish() {
  if (ended_) {
    return *ended_;
  }
  while (!pending_.empty()) {
    KVSHRINK_RETURN_IF_ERROR(Step());
  }
  {
    const ArmedScope armed(guard_.get());
    stream_->WritesDone();
    reader_.join();
  }
  return EndStream();
}

absl::Status PutStream::Step() {
  KVSHRINK_RETURN_IF_ERROR(TakeAnswers());
  KVSHRINK_RETURN_IF_ERROR(SendDue());
  if (pending_.empty()) {
    return absl::OkStatus();
  }
  const Clock::time_point idle_end =
      Clock::now() + std::chrono::milliseconds(options_.idle_timeout_ms);
  Clock::time_point until = Clock::time_point::max();
  bool unanswered = false;
  for (const auto& [id, pending] : pending_) {
    unanswered = unanswered || !pending.send_at;
    until = std::min(until, pending.send_at.value_or(until));
  }
  until = unanswered ? std::min(until, idle_end) : until;
  {
    std::unique_lock lock(mutex_);
    if (changed_.wait_until(lock, until, [this] { return !answers_.empty() || !reading_; }) ||
        until < idle_end) {
      return absl::OkStatus();
    }
  }
  guard_->Expire();
  return Fail(absl::OkStatus());
}

absl::Status PutStream::TakeAnswers() {
  std::deque<v1::PutResponse> answers;
  bool reading = true;
  {
    const std::lock_guard lock(mutex_);
    answers.swap(answers_);
    reading = reading_;
  }
  for (const v1::PutResponse& answer : answers) {
    const auto found = pending_.find(answer.object_id());
    if (found == pending_.end() || found->second.send_at) {
      return Fail(absl::DataLossError(StrCat("server ", options_.server, ": field 'object_id' is ",
                                             answer.object_id(), ": no such object is under way")));
    }
    if (TryLater(answer, &found->second)) {
      continue;
    }
    const auto node = pending_.extract(found);
    pending_bytes_ -= node.mapped().object.body_bytes();
    on_answer_(node.mapped().object, answer);
  }
  return reading ? absl::OkStatus() : Fail(absl::OkStatus());
}

bool PutStream::TryLater(const v1::PutResponse& answer, Pending* pending) {
  const v1::ObjectStatus& status = answer.status();
  if (status.code() != static_cast<int>(absl::StatusCode::kResourceExhausted) ||
      status.retry_after_ms() == 0) {
    return false;
  }
  const Clock::time_point now = Clock::now();
  if (!pending->first_refusal) {
    pending->first_refusal = now;
  }
  const auto wait =
      std::chrono::milliseconds(std::clamp(status.retry_after_ms(), kMinRetryMs, kMaxRetryMs));
  const auto limit = std::chrono::milliseconds(options_.retry_for_ms);
  if (now + wait > *pending->first_refusal + limit) {
    return false;
  }
  pending->send_at = now + wait;
  return true;
}

absl::Status PutStream::SendDue() {
  const Clock::time_point now = Clock::now();
  for (auto& [id, pending] : pending_) {
    if (pending.send_at && *pending.send_at <= now) {
      pending.send_at.reset();
      ++resent_objects_;
      KVSHRINK_RETURN_IF_ERROR(Write(pending.object));
    }
  }
  return absl::OkStatus();
}

absl::Status PutStream::Write(const PutObject& object) {
  v1::PutRequest message;
  *message.mutable_header() = object.header;
  KVSHRINK_RETURN_IF_ERROR(WriteMessage(message));
  for (std::string_view part : object.parts) {
    while (!part.empty()) {
      const std::string_view frame = part.substr(0, kMaxFrameBytes);
      message.set_frame(frame.data(), frame.size());
      KVSHRINK_RETURN_IF_ERROR(WriteMessage(message));
      part.remove_prefix(frame.size());
    }
  }
  return absl::OkStatus();
}

absl::Status PutStream::WriteMessage(const v1::PutRequest& message) {
  bool written = false;
  {
    const ArmedScope armed(guard_.get());
    written = stream_->Write(message);
  }
  if (!written) {
    return Fail(absl::OkStatus());
  }
  wire_bytes_ += WireBytes(message);
  return absl::OkStatus();
}

// Cancels and ends the stream. `status` OK: what the stream itself says is the reason.
absl::Status PutStream::Fail(absl::Status status) {
  if (ended_) {
    return *ended_;
  }
  bool reading = false;
  {
    const std::lock_guard lock(mutex_);
    reading = reading_;
  }
  if (!status.ok()) {
    context_.TryCancel();
  } else if (reading) {
    // A failed write means that the stream is over: its status is about to come.
    const ArmedScope armed(guard_.get());
    reader_.join();
  }
  if (reader_.joinable()) {
    reader_.join();
  }
  const absl::Status ended = EndStream();
  if (!status.ok()) {
    ended_ = std::move(status);
  } else if (ended.ok()) {
    ended_ = absl::UnavailableError(StrCat("server ", options_.server, " ended the stream with ",
                                           pending_.size(), " objects unanswered"));
  }
  return *ended_;
}

absl::Status PutStream::EndStream() {
  const absl::Status status = ToStatus(stream_->Finish(), options_.server);
  ended_ = guard_->expired() ? absl::DeadlineExceededError(StrCat("server ", options_.server,
                                                                  ": no progress on the stream in ",
                                                                  options_.idle_timeout_ms, " ms"))
                             : status;
  return *ended_;
}

}  // namespace kvshrink::client
