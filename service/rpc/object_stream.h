// Put, Compress, Decompress and Attend: a header is checked and admitted, its frames are collected,
// a job makes the answer.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "service/rpc/bidi_stream.h"
#include "service/rpc/frame_assembler.h"

namespace kvshrink::service {

// What a header came to. `Details` is each RPC's own.
template <class Details>
struct Accepted {
  Details details;
  uint64_t charge_bytes = 0;  // memory of the body, the answer and the work between
};

template <class Request, class Response, class Header, class Details>
class ObjectStream : public BidiStream<Request, Response> {
 public:
  using Base = BidiStream<Request, Response>;
  using Base::Base;

 protected:
  using Answer = Outgoing<Response>;

  struct Object {
    uint64_t id = 0;
    Details details;
    std::shared_ptr<Ticket> ticket;
    uint64_t charge_bytes = 0;
    std::string body;
    absl::Time ready;
  };

  virtual uint64_t IdOf(const Header& header) const = 0;
  // Of the frames that follow; also for headers that will be refused.
  virtual uint64_t BodyBytesOf(const Header& header) const = 0;
  // Every check that needs no body. Errors become the object's answer.
  virtual absl::StatusOr<Accepted<Details>> Check(const Header& header) = 0;
  // Makes the answer, on a thread of the executor. Errors become the object's answer.
  virtual absl::StatusOr<Answer> Work(Object& object) = 0;
  virtual v1::ObjectStatus* StatusOf(Response* response) const = 0;

  // The whole answer but for its id: header and body, which shares the object's ticket.
  static Answer WithBody(const Object& object, std::string body) {
    Answer answer;
    answer.body_bytes = body.size();
    answer.body = std::make_shared<const std::string>(std::move(body));
    answer.keep = object.ticket;
    return answer;
  }

 private:
  absl::Status OnMessage(Request& message) final {
    switch (message.part_case()) {
      case Request::kHeader:
        return OnHeader(message.header());
      case Request::kFrame:
        return OnFrame(std::move(*message.mutable_frame()));
      default:
        return absl::InvalidArgumentError("field 'part' is not set: must be header or frame");
    }
  }

  absl::Status OnHeader(const Header& header) {
    const uint64_t id = IdOf(header);
    const uint64_t body_bytes = BodyBytesOf(header);
    KVSHRINK_RETURN_IF_ERROR(assembler_.Begin(id, body_bytes));
    if (absl::Status status = Admit(header, body_bytes); !status.ok()) {
      assembler_.Refuse();
      SendError(id, status, absl::ZeroDuration());
    } else {
      assembler_.Accept();
    }
    return absl::OkStatus();
  }

  absl::Status Admit(const Header& header, uint64_t body_bytes) {
    if (this->env_.draining) {
      return absl::UnavailableError("the daemon is draining");
    }
    absl::StatusOr<Accepted<Details>> accepted = Check(header);
    if (!accepted.ok()) {
      return accepted.status();
    }
    if (body_bytes == 0 || body_bytes > this->env_.max_object_bytes) {
      return BadArgument("body_bytes", body_bytes,
                         StrCat("must be 1..", this->env_.max_object_bytes));
    }
    absl::StatusOr<Ticket> ticket = this->env_.admission->Admit(accepted->charge_bytes);
    if (!ticket.ok()) {
      return ticket.status();
    }
    object_ = std::make_unique<Object>();
    object_->id = IdOf(header);
    object_->details = std::move(accepted->details);
    object_->charge_bytes = accepted->charge_bytes;
    object_->ticket = std::make_shared<Ticket>(std::move(*ticket));
    return absl::OkStatus();
  }

  absl::Status OnFrame(std::string frame) {
    const uint64_t bytes = frame.size();
    absl::StatusOr<bool> complete = assembler_.Add(std::move(frame));
    if (!complete.ok()) {
      return complete.status();
    }
    this->env_.metrics->BytesIn(this->rpc_, bytes);
    if (*complete) {
      object_->body = assembler_.TakeBody();
      object_->ready = absl::Now();
      this->BeginWork(object_->charge_bytes);
      this->Submit([this, object = std::move(object_)] { Run(*object); });
    }
    return absl::OkStatus();
  }

  absl::Status OnEnd() final { return assembler_.End(); }
  bool InsideObject() const final { return assembler_.inside(); }

  void Run(Object& object) {
    absl::StatusOr<Answer> answer = Work(object);
    object.body = std::string();  // its memory goes before the ticket does
    object.ticket.reset();
    const absl::Duration took = absl::Now() - object.ready;
    if (!answer.ok()) {
      SendError(object.id, answer.status(), took);
    } else {
      SetId(object.id, &answer->message);
      answer->last = true;
      StatusOf(&answer->message);  // present, and OK
      this->env_.metrics->ObjectDone(this->rpc_, absl::StatusCode::kOk, took);
      assembler_.Answered(object.id);
      this->Send(std::move(*answer));
    }
    this->EndWork(object.charge_bytes);
  }

  void SendError(uint64_t id, const absl::Status& status, absl::Duration took) {
    this->env_.metrics->ObjectDone(this->rpc_, status.code(), took);
    Answer answer;
    SetId(id, &answer.message);
    FillStatus(status, this->env_.admission->retry_after_ms(), StatusOf(&answer.message));
    answer.last = true;
    assembler_.Answered(id);
    this->Send(std::move(answer));
  }

  static void SetId(uint64_t id, Response* response) {
    if constexpr (requires { response->request_id(); }) {
      response->set_request_id(id);
    } else {
      response->set_object_id(id);
    }
  }

  FrameAssembler assembler_;
  std::unique_ptr<Object> object_;  // admitted, its body not complete
};

}  // namespace kvshrink::service
