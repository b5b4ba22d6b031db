// Remote::Get: requests for runs of chunks, two of them under way, and the answers put together
// again.
#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "idle_guard.h"
#include "kvshrink/client/remote.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"

namespace kvshrink::client {
namespace {

// Small enough that two requests fit the window of a stream whose server is busy answering: writing
// one never waits.
constexpr size_t kChunksPerRequest = 64;
constexpr size_t kRequestsUnderWay = 2;

size_t RequestCount(const GetQuery& query) {
  return (query.keys.size() + kChunksPerRequest - 1) / kChunksPerRequest;
}

v1::GetRequest MakeRequest(const GetQuery& query, size_t number) {
  v1::GetRequest request;
  request.set_request_id(number + 1);
  const size_t end = std::min(query.keys.size(), (number + 1) * kChunksPerRequest);
  for (size_t i = number * kChunksPerRequest; i < end; ++i) {
    v1::ChunkId* chunk = request.add_chunks();
    chunk->set_namespace_(query.name_space);
    chunk->set_key(query.keys[i]);
  }
  for (const uint32_t layer : query.layers) {
    request.add_layers(layer);
  }
  request.set_form(query.form);
  request.set_dtype(query.dtype);
  return request;
}

// Puts the messages of a stream together and checks their sequence: what comes is no better than a
// stranger's file.
class Assembler {
 public:
  Assembler(const GetQuery& query, uint64_t max_body_bytes)
      : query_(query), max_body_bytes_(max_body_bytes) {}

  size_t requests_done() const { return requests_done_; }

  // A shard when the message completes one.
  absl::StatusOr<std::optional<GotShard>> Add(v1::GetResponse message) {
    if (message.request_id() != requests_done_ + 1) {
      return Broken("request_id", message.request_id(), StrCat("must be ", requests_done_ + 1));
    }
    if (message.has_header()) {
      KVSHRINK_RETURN_IF_ERROR(AddHeader(std::move(*message.mutable_header())));
    } else {
      KVSHRINK_RETURN_IF_ERROR(AddFrame(message.frame()));
    }
    std::optional<GotShard> result;
    if (shard_ && shard_->body.size() == shard_->header.body_bytes()) {
      result = std::move(shard_);
      shard_.reset();
    }
    if (message.last()) {
      ++requests_done_;
      const size_t end = std::min(query_.keys.size(), requests_done_ * kChunksPerRequest);
      if (shard_ || next_chunk_ != end) {
        return Broken("last", "set", "the request is not answered in full");
      }
    }
    return result;
  }

 private:
  template <typename Value>
  static absl::Status Broken(std::string_view field, const Value& value, std::string_view rule) {
    return absl::DataLossError(StrCat("answer field '", field, "' is ", value, ": ", rule));
  }

  absl::Status AddHeader(v1::GetHeader header) {
    if (shard_) {
      return Broken("header", "there",
                    StrCat("the body before has ", shard_->body.size(), " of ",
                           shard_->header.body_bytes(), " bytes"));
    }
    const bool failed = header.status().code() != 0;
    const bool same_chunk = next_chunk_ > 0 && !chunk_failed_ &&
                            header.chunk().key() == query_.keys[next_chunk_ - 1] &&
                            (failed || header.shard().layer() > layer_);
    if (!same_chunk) {
      const size_t end = std::min(query_.keys.size(), (requests_done_ + 1) * kChunksPerRequest);
      if (next_chunk_ >= end || header.chunk().key() != query_.keys[next_chunk_]) {
        return Broken("chunk.key", "out of order", "must be in the order asked for");
      }
      ++next_chunk_;
    }
    if (header.body_bytes() > max_body_bytes_) {
      return Broken("body_bytes", header.body_bytes(), StrCat("must be at most ", max_body_bytes_));
    }
    if (failed && header.body_bytes() != 0) {
      return Broken("body_bytes", header.body_bytes(), "an error has no body");
    }
    chunk_failed_ = failed;
    layer_ = header.shard().layer();
    shard_ = GotShard{next_chunk_ - 1, std::move(header), {}};
    return absl::OkStatus();
  }

  // The body grows with what has come, whatever its header promised.
  absl::Status AddFrame(const std::string& frame) {
    if (!shard_) {
      return Broken("frame", StrCat("of ", frame.size(), " bytes"), "no body is open");
    }
    const uint64_t left = shard_->header.body_bytes() - shard_->body.size();
    if (frame.empty() || frame.size() > kMaxFrameBytes || frame.size() > left) {
      return Broken("frame", StrCat("of ", frame.size(), " bytes"),
                    StrCat("must be 1..", std::min(left, kMaxFrameBytes)));
    }
    shard_->body += frame;
    return absl::OkStatus();
  }

  const GetQuery& query_;
  const uint64_t max_body_bytes_;
  size_t requests_done_ = 0;
  size_t next_chunk_ = 0;     // after the one whose answers are coming
  bool chunk_failed_ = true;  // the chunk that is coming has had its error
  uint32_t layer_ = 0;
  std::optional<GotShard> shard_;  // whose body isn't complete
};

}  // namespace

absl::Status Remote::Get(const GetQuery& query, const std::function<absl::Status(GotShard)>& visit,
                         uint64_t* wire_bytes) {
  if (query.keys.empty()) {
    return absl::OkStatus();
  }
  grpc::ClientContext context;
  if (options_.stream_timeout_ms > 0) {
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::milliseconds(options_.stream_timeout_ms));
  }
  IdleGuard guard(&context, options_.idle_timeout_ms);
  const auto stream = stub_->Get(&context);
  const size_t requests = RequestCount(query);
  Assembler assembler(query, options_.max_body_bytes);
  absl::Status status;
  size_t written = 0;
  while (status.ok() && assembler.requests_done() < requests) {
    v1::GetResponse message;
    bool alive = true;
    {
      const ArmedScope armed(&guard);
      while (alive && written < std::min(requests, assembler.requests_done() + kRequestsUnderWay)) {
        alive = stream->Write(MakeRequest(query, written++));
      }
      alive = alive && stream->Read(&message);
    }
    if (!alive) {
      break;
    }
    if (wire_bytes != nullptr) {
      *wire_bytes += WireBytes(message);
    }
    auto shard = assembler.Add(std::move(message));
    status = shard.status();
    if (status.ok() && shard->has_value()) {
      status = visit(*std::move(*shard));
    }
  }
  if (!status.ok()) {
    context.TryCancel();
  }
  {
    const ArmedScope armed(&guard);
    stream->WritesDone();
    v1::GetResponse rest;
    while (stream->Read(&rest)) {
    }
  }
  const grpc::Status ended = stream->Finish();
  if (!status.ok()) {
    return status;
  }
  if (guard.expired()) {
    return absl::DeadlineExceededError(StrCat("server ", options_.server,
                                              ": no progress on the stream in ",
                                              options_.idle_timeout_ms, " ms"));
  }
  KVSHRINK_RETURN_IF_ERROR(ToStatus(ended, options_.server));
  if (assembler.requests_done() < requests) {
    return absl::DataLossError(StrCat("server ", options_.server, " ended the stream after ",
                                      assembler.requests_done(), " of ", requests, " requests"));
  }
  return absl::OkStatus();
}

}  // namespace kvshrink::client
