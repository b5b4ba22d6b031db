// A stream of objects to store: sent one after the other without waiting, answered in any order.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "kvshrink/client/remote_options.h"
#include "kvshrink/v1/kvshrink.grpc.pb.h"

namespace kvshrink::client {

class IdleGuard;

struct PutObject {
  v1::PutHeader header;  // object_id and body_bytes are set by the stream
  // The body, in parts that are sent one after the other. They must live until the object's answer,
  // in `owned` or elsewhere.
  std::vector<std::string_view> parts;
  std::shared_ptr<const std::string> owned;

  uint64_t body_bytes() const;
};

// Not thread-safe: one thread sends and finishes; answers are given to it, inside Send and Finish.
// At most inflight_bytes are held at a time (or one object that is larger). An object that the
// server refuses for want of room is sent again when the server says, for at most retry_for_ms;
// until then it counts as in flight.
class PutStream {
 public:
  using Stub = v1::KVShrink::Stub;
  // An object and its final answer, whose status may be an error: the stream lives on.
  using OnAnswer = std::function<void(const PutObject&, const v1::PutResponse&)>;

  PutStream(Stub* stub, const RemoteOptions& options, OnAnswer on_answer);
  ~PutStream();  // cancels what isn't finished

  // Waits until there is room, then writes. Errors: of the stream as a whole; it is then of no more
  // use.
  absl::Status Send(PutObject object);
  // Waits for all answers and ends the stream.
  absl::Status Finish();

  uint64_t wire_bytes() const { return wire_bytes_; }  // of the messages sent
  uint64_t resent_objects() const { return resent_objects_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Pending {
    PutObject object;
    std::optional<Clock::time_point> first_refusal;
    std::optional<Clock::time_point> send_at;  // waits to be sent again
  };

  void ReadAnswers();
  // Takes answers that have come, sends again what is due, then waits for either to happen.
  absl::Status Step();
  absl::Status TakeAnswers();
  absl::Status SendDue();
  bool TryLater(const v1::PutResponse& answer, Pending* pending);
  absl::Status Write(const PutObject& object);
  absl::Status WriteMessage(const v1::PutRequest& message);
  absl::Status Fail(absl::Status status);
  absl::Status EndStream();

  RemoteOptions options_;
  OnAnswer on_answer_;
  grpc::ClientContext context_;
  std::unique_ptr<IdleGuard> guard_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::PutRequest, v1::PutResponse>> stream_;

  // Of the sending thread.
  std::map<uint64_t, Pending> pending_;
  uint64_t pending_bytes_ = 0;
  uint64_t next_object_id_ = 1;
  uint64_t wire_bytes_ = 0;
  uint64_t resent_objects_ = 0;
  std::optional<absl::Status> ended_;

  // Shared with the reading thread.
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<v1::PutResponse> answers_;
  bool reading_ = true;
  std::thread reader_;
};

}  // namespace kvshrink::client
