#include "service/rpc/frame_assembler.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kvshrink/error.h"
#include "service/rpc/limits.h"

namespace kvshrink::service {

absl::Status FrameAssembler::Begin(uint64_t object_id, uint64_t body_bytes) {
  if (state_ == State::kCollect) {
    return absl::InvalidArgumentError(
        absl::StrCat("header of object ", object_id, " came before the body of object ", object_id_,
                     " was complete: ", body_.size(), " of ", body_bytes_, " bytes"));
  }
  {
    absl::MutexLock lock(&mu_);
    if (!unanswered_.insert(object_id).second) {
      return BadArgument("object_id", object_id, "is in use by an object not yet answered");
    }
  }
  state_ = State::kDrop;
  object_id_ = object_id;
  body_bytes_ = body_bytes;
  dropped_bytes_ = 0;
  return absl::OkStatus();
}

void FrameAssembler::Accept() { state_ = State::kCollect; }

void FrameAssembler::Refuse() { state_ = State::kDrop; }

absl::StatusOr<bool> FrameAssembler::Add(std::string frame) {
  if (state_ == State::kIdle) {
    return absl::InvalidArgumentError("a frame came with no header before it");
  }
  if (frame.empty() || frame.size() > kMaxFrameBytes) {
    return BadArgument("frame", absl::StrCat(frame.size(), " bytes"),
                       absl::StrCat("must be 1..", kMaxFrameBytes, " bytes"));
  }
  const uint64_t have = state_ == State::kCollect ? body_.size() : dropped_bytes_;
  if (frame.size() > body_bytes_ - have) {
    return BadArgument("frame", absl::StrCat(frame.size(), " bytes"),
                       absl::StrCat("goes beyond body_bytes ", body_bytes_, " of object ",
                                    object_id_, ", of which ", have, " are there"));
  }
  if (state_ == State::kDrop) {
    dropped_bytes_ += frame.size();
    return false;
  }
  if (body_.empty() && frame.size() == body_bytes_) {
    body_ = std::move(frame);
  } else {
    body_.reserve(body_bytes_);
    body_.append(frame);
  }
  if (body_.size() < body_bytes_) {
    return false;
  }
  state_ = State::kIdle;
  return true;
}

std::string FrameAssembler::TakeBody() { return std::exchange(body_, std::string()); }

absl::Status FrameAssembler::End() const {
  if (state_ == State::kCollect) {
    return absl::InvalidArgumentError(absl::StrCat("the stream ended inside the body of object ",
                                                   object_id_, ": ", body_.size(), " of ",
                                                   body_bytes_, " bytes"));
  }
  return absl::OkStatus();
}

void FrameAssembler::Answered(uint64_t object_id) {
  absl::MutexLock lock(&mu_);
  unanswered_.erase(object_id);
}

}  // namespace kvshrink::service
