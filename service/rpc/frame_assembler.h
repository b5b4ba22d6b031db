// The sequence of headers and frames that Put, Compress, Decompress and Attend share: what is
// legal, and the body that results.
#pragma once

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace kvshrink::service {

// Every error is INVALID_ARGUMENT and ends the stream. Not thread-safe but for Answered.
class FrameAssembler {
 public:
  // A header came. Illegal: the body before isn't complete; the id is in use by an object not yet
  // answered. Accept or Refuse must follow.
  absl::Status Begin(uint64_t object_id, uint64_t body_bytes);
  // Its frames will be collected; body_bytes > 0. Memory is taken from the first frame on.
  void Accept();
  // Its frames, if they still come, will be dropped.
  void Refuse();

  // A frame came. True: the body is complete, take it. Illegal: no header before it, empty, over 1
  // MiB, beyond body_bytes.
  absl::StatusOr<bool> Add(std::string frame);
  std::string TakeBody();

  // The client has sent all. Illegal: inside a body.
  absl::Status End() const;

  // An accepted object's body is not yet complete.
  bool inside() const { return state_ == State::kCollect; }
  uint64_t object_id() const { return object_id_; }

  // The object's answer is on its way: its id may be used again.
  void Answered(uint64_t object_id);

 private:
  enum class State { kIdle, kCollect, kDrop };

  State state_ = State::kIdle;
  uint64_t object_id_ = 0;
  uint64_t body_bytes_ = 0;
  uint64_t dropped_bytes_ = 0;
  std::string body_;

  absl::Mutex mu_;
  absl::flat_hash_set<uint64_t> unanswered_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvshrink::service
