// Remote::Attend: one request on a stream of its own.
#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "idle_guard.h"
#include "kvshrink/client/remote.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"

namespace kvshrink::client {
namespace {

using Stream = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;

constexpr uint64_t kRequestId = 1;
constexpr uint32_t kMaxRetryMs = 10'000;

template <typename Value>
absl::Status Broken(std::string_view field, const Value& value, std::string_view rule) {
  return absl::DataLossError(StrCat("answer field '", field, "' is ", value, ": ", rule));
}

// What the body of an answer must have, from what was asked and the answer's own counts.
absl::Status CheckAnswer(const v1::AttendHeader& asked, const v1::AttendAnswer& answer) {
  const uint64_t rows = uint64_t{asked.queries()} * asked.q_heads();
  uint64_t expected = 0;
  if (asked.mode() == v1::ATTEND_MODE_OUTPUT) {
    expected = rows * (uint64_t{asked.head_dim()} + 1) * sizeof(float);
  } else if (asked.top_k() > 0) {
    if (answer.top_k() != std::min(asked.top_k(), answer.tokens())) {
      return Broken("top_k", answer.top_k(), "must be the k asked for or the number of tokens");
    }
    expected = rows * answer.top_k() * (sizeof(float) + sizeof(uint32_t));
  } else {
    expected = rows * answer.tokens() * sizeof(float);
  }
  if (answer.body_bytes() != expected) {
    return Broken("body_bytes", answer.body_bytes(), StrCat("must be ", expected));
  }
  return absl::OkStatus();
}

bool WriteRequest(Stream* stream, const v1::AttendHeader& header, std::string_view queries) {
  v1::AttendRequest request;
  *request.mutable_header() = header;
  bool written = stream->Write(request);
  while (written && !queries.empty()) {
    const std::string_view frame = queries.substr(0, kMaxFrameBytes);
    request.set_frame(frame.data(), frame.size());
    written = stream->Write(request);
    queries.remove_prefix(frame.size());
  }
  return written && stream->WritesDone();
}

absl::Status ReadAnswer(Stream* stream, IdleGuard* guard, const v1::AttendHeader& header,
                        uint64_t max_body_bytes, AttendResult* result) {
  bool have_header = false;
  v1::AttendResponse message;
  while (true) {
    {
      const ArmedScope armed(guard);
      if (!stream->Read(&message)) {
        return absl::UnavailableError("the stream ended before the answer");
      }
    }
    result->wire_bytes += WireBytes(message);
    if (message.request_id() != kRequestId) {
      return Broken("request_id", message.request_id(), StrCat("must be ", kRequestId));
    }
    if (message.has_header() == have_header) {
      return Broken("header", have_header ? "there twice" : "missing",
                    "must come once, then frames");
    }
    if (message.has_header()) {
      have_header = true;
      result->answer = message.header();
      if (result->answer.status().code() == 0) {
        KVSHRINK_RETURN_IF_ERROR(CheckAnswer(header, result->answer));
      } else if (result->answer.body_bytes() != 0) {
        return Broken("body_bytes", result->answer.body_bytes(), "an error has no body");
      }
      if (result->answer.body_bytes() > max_body_bytes) {
        return Broken("body_bytes", result->answer.body_bytes(),
                      StrCat("must be at most ", max_body_bytes));
      }
    } else {
      result->body += message.frame();
      if (message.frame().empty() || result->body.size() > result->answer.body_bytes()) {
        return Broken("frame", StrCat("of ", message.frame().size(), " bytes"),
                      "must have bytes, within body_bytes");
      }
    }
    if (message.last() || result->body.size() == result->answer.body_bytes()) {
      if (!message.last() || result->body.size() != result->answer.body_bytes()) {
        return Broken(
            "last", message.last() ? "set" : "not set",
            StrCat(result->body.size(), " of ", result->answer.body_bytes(), " bytes are there"));
      }
      return absl::OkStatus();
    }
  }
}

absl::StatusOr<AttendResult> AttendOnce(v1::KVShrink::Stub* stub, const RemoteOptions& options,
                                        const v1::AttendHeader& header, std::string_view queries) {
  grpc::ClientContext context;
  if (options.stream_timeout_ms > 0) {
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::milliseconds(options.stream_timeout_ms));
  }
  IdleGuard guard(&context, options.idle_timeout_ms);
  const auto stream = stub->Attend(&context);
  AttendResult result;
  {
    const ArmedScope armed(&guard);
    // When writing fails the stream is over, and reading says so.
    WriteRequest(stream.get(), header, queries);
  }
  const absl::Status status =
      ReadAnswer(stream.get(), &guard, header, options.max_body_bytes, &result);
  if (!status.ok() && !absl::IsUnavailable(status)) {
    context.TryCancel();
  }
  {
    const ArmedScope armed(&guard);
    v1::AttendResponse rest;
    while (stream->Read(&rest)) {
    }
  }
  const grpc::Status ended = stream->Finish();
  if (guard.expired()) {
    return absl::DeadlineExceededError(StrCat("server ", options.server,
                                              ": no progress on the stream in ",
                                              options.idle_timeout_ms, " ms"));
  }
  if (absl::IsUnavailable(status) && !ended.ok()) {
    return ToStatus(ended, options.server);
  }
  if (!status.ok()) {
    return InContext(StrCat("server ", options.server), status);
  }
  KVSHRINK_RETURN_IF_ERROR(ToStatus(ended, options.server));
  return result;
}

}  // namespace

absl::StatusOr<AttendResult> Remote::Attend(v1::AttendHeader header, std::string_view queries) {
  header.set_request_id(kRequestId);
  const auto give_up =
      std::chrono::steady_clock::now() + std::chrono::milliseconds(options_.retry_for_ms);
  while (true) {
    KVSHRINK_ASSIGN_OR_RETURN(AttendResult result,
                              AttendOnce(stub_.get(), options_, header, queries));
    const v1::ObjectStatus& status = result.answer.status();
    if (status.code() == 0) {
      return result;
    }
    const auto wait = std::chrono::milliseconds(std::min(status.retry_after_ms(), kMaxRetryMs));
    const bool refused = status.code() == static_cast<int>(absl::StatusCode::kResourceExhausted);
    if (!refused || wait.count() == 0 || std::chrono::steady_clock::now() + wait > give_up) {
      return ToStatus(status);
    }
    std::this_thread::sleep_for(wait);
  }
}

}  // namespace kvshrink::client
