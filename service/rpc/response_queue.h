// Answers of a stream that wait to be written. Frames are cut from a body one at a time, so that
// beside the body itself (which its ticket accounts for) a stream holds one frame.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "service/rpc/limits.h"

namespace kvshrink::service {

template <class Response>
struct Outgoing {
  Response message;                         // the header (of Put: the whole answer)
  std::shared_ptr<const std::string> body;  // null: no frames
  uint64_t body_bytes = 0;                  // how much of it is sent, from its start
  std::shared_ptr<const void> keep;         // freed when all is written: the ticket
  bool last = false;                        // the final message of this answer has `last` set
};

// Not thread-safe.
template <class Response>
class ResponseQueue {
 public:
  void Push(Outgoing<Response> answer) {
    body_bytes_ += answer.body_bytes;
    answers_.push_back(std::move(answer));
  }

  bool empty() const { return answers_.empty(); }
  size_t size() const { return answers_.size(); }
  uint64_t body_bytes() const { return body_bytes_; }
  void Clear() {
    answers_.clear();
    offset_ = 0;
    header_sent_ = false;
    body_bytes_ = 0;
  }

  // Makes the next message to write; returns the bytes of its frame. Must not be empty.
  uint64_t Next(Response* out) {
    Outgoing<Response>& front = answers_.front();
    uint64_t frame_bytes = 0;
    if (!header_sent_) {
      *out = std::move(front.message);
      CopyId(*out, &front.message);
      header_sent_ = true;
    } else {
      frame_bytes = std::min<uint64_t>(kMaxFrameBytes, front.body_bytes - offset_);
      out->Clear();
      CopyId(front.message, out);
      SetFrame(std::string_view(*front.body).substr(offset_, frame_bytes), out);
      offset_ += frame_bytes;
    }
    if (offset_ == front.body_bytes) {
      SetLast(front.last, out);
      body_bytes_ -= front.body_bytes;
      answers_.pop_front();
      offset_ = 0;
      header_sent_ = false;
    }
    return frame_bytes;
  }

 private:
  static void CopyId(const Response& from, Response* to) {
    if constexpr (requires { from.request_id(); }) {
      to->set_request_id(from.request_id());
    } else {
      to->set_object_id(from.object_id());
    }
  }
  static void SetFrame(std::string_view frame, Response* out) {
    if constexpr (requires { out->mutable_frame(); }) {
      out->set_frame(frame.data(), frame.size());
    }
  }
  static void SetLast(bool last, Response* out) {
    if constexpr (requires { out->last(); }) {
      out->set_last(last);
    }
  }

  std::deque<Outgoing<Response>> answers_;
  uint64_t offset_ = 0;  // in the body of the front
  bool header_sent_ = false;
  uint64_t body_bytes_ = 0;
};

}  // namespace kvshrink::service
