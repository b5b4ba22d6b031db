// Remote::Get: requests for runs of chunks, one after the other, and the answers put together
// again.
#include <algorithm>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include "idle_guard.h"
#include "kvshrink/client/remote.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"

namespace kvshrink::client {
namespace {

// A request is small enough for the window of a stream whose server is busy: writing one never
// waits. Its answers are so many bytes that the pause between two requests doesn't count.
constexpr size_t kChunksPerRequest = 64;
constexpr uint32_t kMaxRetryMs = 10'000;

using Stream = grpc::ClientReaderWriter<v1::GetRequest, v1::GetResponse>;

// Chunks [first, end) of a query.
v1::GetRequest MakeRequest(const GetQuery& query, uint64_t id, size_t first, size_t end) {
  v1::GetRequest request;
  request.set_request_id(id);
  for (size_t i = first; i < end; ++i) {
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

// Puts the messages of one request's answer together and checks their sequence: what comes is no
// better than a stranger's file.
class Assembler {
 public:
  Assembler(const GetQuery& query, uint64_t request_id, size_t first, size_t end,
            uint64_t max_body_bytes)
      : query_(query),
        request_id_(request_id),
        max_body_bytes_(max_body_bytes),
        next_chunk_(first),
        end_chunk_(end) {}

  bool done() const { return done_; }
  // Why the server refused the request as a whole; code 0 when it didn't.
  const v1::ObjectStatus& refusal() const { return refusal_; }

  // A shard when the message completes one.
  absl::StatusOr<std::optional<GotShard>> Add(v1::GetResponse message) {
    if (message.request_id() != request_id_) {
      return Broken("request_id", message.request_id(), StrCat("must be ", request_id_));
    }
    if (IsRefusal(message)) {
      refusal_ = message.header().status();
      done_ = true;
      return std::nullopt;
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
    done_ = message.last();
    if (done_ && (shard_ || next_chunk_ != end_chunk_)) {
      return Broken("last", "set", "the request is not answered in full");
    }
    return result;
  }

 private:
  template <typename Value>
  static absl::Status Broken(std::string_view field, const Value& value, std::string_view rule) {
    return absl::DataLossError(StrCat("answer field '", field, "' is ", value, ": ", rule));
  }

  // One error without a chunk, in place of all answers.
  bool IsRefusal(const v1::GetResponse& message) const {
    return message.last() && message.has_header() && message.header().status().code() != 0 &&
           message.header().chunk().key().empty() && first_message_;
  }

  absl::Status AddHeader(v1::GetHeader header) {
    if (shard_) {
      return Broken("header", "there",
                    StrCat("the body before has ", shard_->body.size(), " of ",
                           shard_->header.body_bytes(), " bytes"));
    }
    first_message_ = false;
    const bool failed = header.status().code() != 0;
    const bool same_chunk = !chunk_failed_ &&
                            header.chunk().key() == query_.keys[next_chunk_ - 1] &&
                            (failed || header.shard().layer() > layer_);
    if (!same_chunk) {
      if (next_chunk_ >= end_chunk_ || header.chunk().key() != query_.keys[next_chunk_]) {
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
  const uint64_t request_id_;
  const uint64_t max_body_bytes_;
  size_t next_chunk_;  // after the one whose answers are coming
  const size_t end_chunk_;
  bool first_message_ = true;
  bool done_ = false;
  v1::ObjectStatus refusal_;
  bool chunk_failed_ = true;  // the chunk that is coming has had its error
  uint32_t layer_ = 0;
  std::optional<GotShard> shard_;  // whose body isn't complete
};

// What became of one request; `lost` when the stream ended in it.
struct Exchanged {
  absl::Status status;
  v1::ObjectStatus refusal;
  bool lost = false;
};

using Visit = std::function<absl::Status(GotShard)>;

Exchanged Exchange(Stream* stream, IdleGuard* guard, const v1::GetRequest& request,
                   Assembler assembler, const Visit& visit, uint64_t* wire_bytes) {
  Exchanged result;
  bool alive = true;
  {
    const ArmedScope armed(guard);
    alive = stream->Write(request);
  }
  while (!assembler.done()) {
    v1::GetResponse message;
    if (alive) {
      const ArmedScope armed(guard);
      alive = stream->Read(&message);
    }
    if (!alive) {
      result.lost = true;
      return result;
    }
    if (wire_bytes != nullptr) {
      *wire_bytes += WireBytes(message);
    }
    auto shard = assembler.Add(std::move(message));
    result.status = shard.status();
    if (result.status.ok() && shard->has_value()) {
      result.status = visit(*std::move(*shard));
    }
    if (!result.status.ok()) {
      return result;
    }
  }
  result.refusal = assembler.refusal();
  return result;
}

// All requests of a query, each sent again while the server says when. `lost`: the stream ended.
absl::Status ExchangeAll(Stream* stream, IdleGuard* guard, const GetQuery& query,
                         const RemoteOptions& options, const Visit& visit, uint64_t* wire_bytes,
                         bool* lost) {
  uint64_t request_id = 0;
  for (size_t first = 0; first < query.keys.size(); first += kChunksPerRequest) {
    const size_t end = std::min(query.keys.size(), first + kChunksPerRequest);
    const auto give_up =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(options.retry_for_ms);
    while (true) {
      ++request_id;
      const Exchanged result = Exchange(
          stream, guard, MakeRequest(query, request_id, first, end),
          Assembler(query, request_id, first, end, options.max_body_bytes), visit, wire_bytes);
      *lost = result.lost;
      if (result.lost || !result.status.ok()) {
        return result.status;
      }
      absl::Status refusal = ToStatus(result.refusal);
      if (refusal.ok()) {
        break;
      }
      const auto wait =
          std::chrono::milliseconds(std::min(result.refusal.retry_after_ms(), kMaxRetryMs));
      if (!absl::IsResourceExhausted(refusal) || wait.count() == 0 ||
          std::chrono::steady_clock::now() + wait > give_up) {
        return refusal;
      }
      std::this_thread::sleep_for(wait);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Remote::Get(const GetQuery& query, const Visit& visit, uint64_t* wire_bytes) {
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
  bool lost = false;
  const absl::Status status =
      ExchangeAll(stream.get(), &guard, query, options_, visit, wire_bytes, &lost);
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
  KVSHRINK_RETURN_IF_ERROR(status);
  if (guard.expired()) {
    return absl::DeadlineExceededError(StrCat("server ", options_.server,
                                              ": no progress on the stream in ",
                                              options_.idle_timeout_ms, " ms"));
  }
  KVSHRINK_RETURN_IF_ERROR(ToStatus(ended, options_.server));
  if (lost) {
    return absl::DataLossError(
        StrCat("server ", options_.server, " ended the stream before its last answer"));
  }
  return absl::OkStatus();
}

}  // namespace kvshrink::client
