// The part that all streaming RPCs share: reading no faster than it works, writing one message at a
// time, ending once.
//
// Three kinds of threads meet here: gRPC's (reactions), the executor's (answers) and the server's
// clock (drain, stalls). `mu_` guards what they share. The stream owns itself from Begin to OnDone;
// jobs hold it by shared_ptr and may outlive the RPC.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "service/rpc/convert.h"
#include "service/rpc/environment.h"
#include "service/rpc/response_queue.h"
#include "service/rpc/stream_registry.h"

namespace kvshrink::service {

// When a stream stops to read until it has caught up.
struct Pace {
  size_t max_works = 1;    // objects in work
  size_t max_answers = 1;  // answers not yet written
};

template <class Request, class Response>
class BidiStream : public grpc::ServerBidiReactor<Request, Response>,
                   public OpenStream,
                   public std::enable_shared_from_this<BidiStream<Request, Response>> {
 public:
  BidiStream(Environment& env, grpc::CallbackServerContext* context, std::string_view rpc,
             Pace pace)
      : env_(env), rpc_(rpc), pace_(pace), context_(context) {}

  void Begin() {
    self_ = this->shared_from_this();
    env_.streams->Add(self_);
    {
      absl::MutexLock lock(&mu_);
      ReadOn();
    }
    if (env_.draining) {
      OnDrain();
    }
  }

  void OnDrain() override {
    {
      absl::MutexLock lock(&mu_);
      draining_ = true;
    }
    Settle();
  }

  void CutOffIfStalled(absl::Time now, absl::Duration timeout) override {
    {
      absl::MutexLock lock(&mu_);
      const bool clients_turn = writing_ || (reading_ && inside_object_);
      if (finished_ || !clients_turn || now - progress_ < timeout) {
        return;
      }
      if (writing_) {
        context_->TryCancel();  // nothing else ends a write that the client doesn't take
        return;
      }
      failure_ = absl::DeadlineExceededError(
          absl::StrCat("no frame of the object's body came for ", absl::FormatDuration(timeout)));
    }
    Settle();
  }

  void OnReadDone(bool ok) final {
    absl::Status status;
    {
      absl::MutexLock lock(&mu_);
      reading_ = false;
      progress_ = absl::Now();
      cancelled_ = cancelled_ || (!ok && context_->IsCancelled());
      handling_ = !dead();
    }
    if (gone()) {
      return Settle();
    }
    status = ok ? OnMessage(request_) : OnEnd();
    {
      absl::MutexLock lock(&mu_);
      handling_ = false;
      inside_object_ = InsideObject();
      read_ended_ = !ok;
      if (!status.ok()) {
        failure_ = status;
      }
      ReadOn();
    }
    Settle();
  }

  void OnWriteDone(bool ok) final {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      progress_ = absl::Now();
      if (!ok) {
        cancelled_ = true;
      }
      WriteOn();
      ReadOn();
    }
    Pump();
    Settle();
  }

  void OnCancel() final {
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
    }
    Settle();
  }

  void OnDone() final {
    std::shared_ptr<OpenStream> self;
    absl::StatusCode code;
    {
      absl::MutexLock lock(&mu_);
      context_ = nullptr;
      code = final_code_;
      self = std::move(self_);
    }
    env_.metrics->RequestDone(rpc_, code);
    env_.streams->Remove(this);
  }

 protected:
  // The read side, one call at a time. An error ends the stream.
  virtual absl::Status OnMessage(Request& message) = 0;
  // The client has sent all, or is gone.
  virtual absl::Status OnEnd() = 0;
  // Whether an object was admitted whose body isn't complete.
  virtual bool InsideObject() const = 0;
  // Called when an answer has moved on; a place to make the next.
  virtual void Pump() {}

  // Nobody waits for answers any more: a job may stop.
  bool gone() const {
    absl::MutexLock lock(&mu_);
    return dead();
  }

  size_t answers() const {
    absl::MutexLock lock(&mu_);
    return queue_.size();
  }

  void BeginWork(uint64_t bytes) {
    absl::MutexLock lock(&mu_);
    ++works_;
    work_bytes_ += bytes;
  }

  void EndWork(uint64_t bytes) {
    {
      absl::MutexLock lock(&mu_);
      --works_;
      work_bytes_ -= bytes;
      ReadOn();
    }
    Settle();
  }

  void Send(Outgoing<Response> answer) {
    {
      absl::MutexLock lock(&mu_);
      if (dead()) {
        return;
      }
      queue_.Push(std::move(answer));
      WriteOn();
    }
    Settle();
  }

  // Runs `job` on the executor unless the client is gone by then. A refusal (which admission is
  // there to prevent) ends the stream.
  void Submit(Executor::Job job) {
    auto self = this->shared_from_this();
    const bool taken = env_.executor->Submit([self, job = std::move(job)]() mutable {
      if (!self->gone()) {
        job();
      }
    });
    if (!taken) {
      Fail(absl::ResourceExhaustedError("the queue of jobs is full"));
    }
  }

  void Fail(absl::Status status) {
    {
      absl::MutexLock lock(&mu_);
      failure_ = std::move(status);
    }
    Settle();
  }

  Environment& env_;
  const std::string_view rpc_;

 private:
  bool dead() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return finished_ || cancelled_ || !failure_.ok();
  }

  void ReadOn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (reading_ || handling_ || read_ended_ || dead()) {
      return;
    }
    const uint64_t share = env_.admission->capacity_bytes() / 4;
    const bool caught_up =
        works_ < pace_.max_works && queue_.size() < pace_.max_answers &&
        (works_ + queue_.size() == 0 || work_bytes_ + queue_.body_bytes() <= share);
    if (inside_object_ || caught_up) {
      reading_ = true;
      progress_ = absl::Now();
      this->StartRead(&request_);
    }
  }

  void WriteOn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || queue_.empty() || dead()) {
      return;
    }
    const uint64_t bytes = queue_.Next(&response_);
    if (bytes > 0) {
      env_.metrics->BytesOut(rpc_, bytes);
    }
    writing_ = true;
    progress_ = absl::Now();
    this->StartWrite(&response_);
  }

  // Why the stream should end now, if it should.
  std::optional<absl::Status> Ending() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (finished_) {
      return std::nullopt;
    }
    if (dead()) {
      queue_.Clear();
      if (writing_) {
        return std::nullopt;
      }
      return cancelled_ ? absl::CancelledError("the client is gone") : failure_;
    }
    if (handling_ || inside_object_ || works_ > 0 || writing_ || !queue_.empty()) {
      return std::nullopt;
    }
    if (read_ended_) {
      return absl::OkStatus();
    }
    if (draining_) {
      return absl::UnavailableError("the daemon is draining");
    }
    return std::nullopt;
  }

  void Settle() {
    auto self = this->shared_from_this();  // Finish may lead to OnDone at once
    std::optional<absl::Status> ending;
    {
      absl::MutexLock lock(&mu_);
      ending = Ending();
      if (ending.has_value()) {
        finished_ = true;
        final_code_ = ending->code();
      }
    }
    if (ending.has_value()) {
      this->Finish(ToGrpc(*ending));
    }
  }

  const Pace pace_;
  mutable absl::Mutex mu_;
  std::shared_ptr<OpenStream> self_;
  grpc::CallbackServerContext* context_ ABSL_GUARDED_BY(mu_);
  Request request_;    // the read in progress or the message handled
  Response response_;  // the write in progress
  ResponseQueue<Response> queue_ ABSL_GUARDED_BY(mu_);
  absl::Time progress_ ABSL_GUARDED_BY(mu_) = absl::Now();
  size_t works_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t work_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  absl::StatusCode final_code_ ABSL_GUARDED_BY(mu_) = absl::StatusCode::kOk;
  bool reading_ ABSL_GUARDED_BY(mu_) = false;
  bool handling_ ABSL_GUARDED_BY(mu_) = false;  // OnMessage or OnEnd is running
  bool inside_object_ ABSL_GUARDED_BY(mu_) = false;
  bool read_ended_ ABSL_GUARDED_BY(mu_) = false;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace kvshrink::service
