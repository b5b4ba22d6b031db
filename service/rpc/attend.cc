#include "service/rpc/attend.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "service/engine/coding.h"
#include "service/observe/log.h"
#include "service/rpc/limits.h"
#include "service/rpc/tenant.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {
namespace {

uint64_t SaturatedProduct(uint64_t a, uint64_t b) {
  return a != 0 && b > std::numeric_limits<uint64_t>::max() / a
             ? std::numeric_limits<uint64_t>::max()
             : a * b;
}

absl::StatusOr<AttentionParams> ToParams(const v1::AttendHeader& header) {
  AttentionParams params;
  params.queries = header.queries();
  params.q_heads = header.q_heads();
  params.scale = static_cast<float>(header.scale());
  params.softcap = static_cast<float>(header.softcap());
  params.first_query = header.has_first_query() ? int64_t{header.first_query()} : -1;
  params.window = header.window();
  if (!std::isfinite(params.scale)) {
    return BadArgument("scale", header.scale(), "must be finite");
  }
  if (!std::isfinite(params.softcap)) {
    return BadArgument("softcap", header.softcap(), "must be finite");
  }
  return params;
}

// Bounds on what is multiplied next; the codec checks the rest against each shard.
absl::Status CheckCounts(const v1::AttendHeader& header) {
  if (header.chunks_size() == 0 || header.chunks_size() > kMaxChunksPerRequest) {
    return BadArgument("chunks", StrCat(header.chunks_size(), " chunks"),
                       StrCat("must be 1..", kMaxChunksPerRequest));
  }
  if (header.layer() > kMaxLayer) {
    return BadArgument("layer", header.layer(), StrCat("must be 0..", kMaxLayer));
  }
  if (header.mode() != v1::ATTEND_MODE_SCORES && header.mode() != v1::ATTEND_MODE_OUTPUT) {
    return BadArgument("mode", static_cast<int>(header.mode()),
                       "must be ATTEND_MODE_SCORES or ATTEND_MODE_OUTPUT");
  }
  if (header.mode() == v1::ATTEND_MODE_OUTPUT && header.top_k() != 0) {
    return BadArgument("top_k", header.top_k(), "must be 0 for ATTEND_MODE_OUTPUT");
  }
  if (header.queries() == 0 || header.queries() > kMaxQueries) {
    return BadArgument("queries", header.queries(), StrCat("must be 1..", kMaxQueries));
  }
  if (header.q_heads() == 0 || header.q_heads() > kMaxQHeads) {
    return BadArgument("q_heads", header.q_heads(), StrCat("must be 1..", kMaxQHeads));
  }
  if (header.head_dim() == 0 || header.head_dim() > kMaxHeadDim) {
    return BadArgument("head_dim", header.head_dim(), StrCat("must be 1..", kMaxHeadDim));
  }
  return absl::OkStatus();
}

const store::ShardMeta* FindLayer(const store::ChunkStat& stat, uint32_t layer) {
  const auto found =
      std::find_if(stat.shards.begin(), stat.shards.end(),
                   [layer](const store::ShardMeta& meta) { return meta.layer == layer; });
  return found == stat.shards.end() ? nullptr : &*found;
}

absl::Status InChunk(const v1::ChunkId& id, const absl::Status& status) {
  return absl::Status(status.code(), StrCat("chunk ", Printable(id.key()), ": ", status.message()));
}

absl::StatusOr<std::vector<float>> ToQueries(const AttendDetails& details, std::string_view body) {
  std::vector<float> q(details.task.query_values());
  ToFloats(body.data(), details.dtype, q.size(), q.data());
  for (size_t i = 0; i < q.size(); ++i) {
    if (!std::isfinite(q[i])) {
      return BadArgument(StrCat("queries[", i, "]"), q[i], "must be finite");
    }
  }
  return q;
}

}  // namespace

AttendStream::AttendStream(Environment& env, grpc::CallbackServerContext* context)
    : ObjectStream(env, context, "Attend", Pace{1, 1}), tenant_(TenantOf(*context)) {}

uint64_t AttendStream::BodyBytesOf(const v1::AttendHeader& header) const {
  absl::StatusOr<DType> dtype = ToDType(header.dtype(), "dtype");
  const uint64_t size = dtype.ok() ? DTypeBytes(*dtype) : DTypeBytes(DType::kFp32);
  return SaturatedProduct(
      SaturatedProduct(uint64_t{header.queries()} * header.q_heads(), header.head_dim()), size);
}

absl::StatusOr<Accepted<AttendDetails>> AttendStream::Check(const v1::AttendHeader& header) {
  KVSHRINK_RETURN_IF_ERROR(CheckCounts(header));
  absl::StatusOr<DType> dtype = ToDType(header.dtype(), "dtype");
  if (!dtype.ok()) {
    return dtype.status();
  }
  absl::StatusOr<AttentionParams> params = ToParams(header);
  if (!params.ok()) {
    return params.status();
  }
  Accepted<AttendDetails> accepted;
  AttendDetails& details = accepted.details;
  details.dtype = *dtype;
  details.layer = header.layer();
  AttendTask& task = details.task;
  task.params = *params;
  task.head_dim = header.head_dim();
  task.output = header.mode() == v1::ATTEND_MODE_OUTPUT;
  absl::StatusOr<uint64_t> shard_bytes = CheckChunks(header, details);
  if (!shard_bytes.ok()) {
    return shard_bytes.status();
  }
  task.top_k = static_cast<uint32_t>(std::min<uint64_t>(header.top_k(), task.tokens));
  const uint64_t most = std::max(task.answer_bytes(), task.scratch_bytes());
  if (most > env_.max_object_bytes) {
    return BadArgument("queries", header.queries(),
                       StrCat("with these heads and chunks it takes ", most, " bytes: at most ",
                              env_.max_object_bytes));
  }
  accepted.charge_bytes = BodyBytesOf(header) + task.query_values() * sizeof(float) +
                          task.answer_bytes() + task.scratch_bytes() + *shard_bytes;
  return accepted;
}

absl::StatusOr<uint64_t> AttendStream::CheckChunks(const v1::AttendHeader& header,
                                                   AttendDetails& details) const {
  uint64_t largest = 0;
  for (int i = 0; i < header.chunks_size(); ++i) {
    absl::StatusOr<store::ChunkKey> key =
        ToChunkKey(tenant_, header.chunks(i), StrCat("chunks[", i, "]"));
    if (!key.ok()) {
      return key.status();
    }
    absl::StatusOr<store::ChunkStat> stat = env_.store->Stat(*key);
    if (!stat.ok() || !stat->committed) {
      return InChunk(header.chunks(i), absl::NotFoundError("is not there"));
    }
    const store::ShardMeta* meta = FindLayer(*stat, header.layer());
    if (meta == nullptr) {
      return BadArgument("layer", header.layer(),
                         StrCat("the chunk has ", stat->layers, " layers"));
    }
    if (meta->head_dim != header.head_dim()) {
      return BadArgument("head_dim", header.head_dim(),
                         StrCat("chunks[", i, "] has head_dim ", meta->head_dim));
    }
    if (meta->keys_only && details.task.output) {
      return absl::FailedPreconditionError(
          StrCat("chunks[", i, "] has keys only in layer ", header.layer(),
                 ": it gives ATTEND_MODE_SCORES, no ATTEND_MODE_OUTPUT"));
    }
    ShardHeader shard;
    shard.shape = {meta->tokens, meta->kv_heads, meta->head_dim};
    shard.first_token = meta->first_token;
    shard.layer = meta->layer;
    KVSHRINK_RETURN_IF_ERROR(ValidateAttention(details.task.params, shard));
    if (i > 0 && meta->kv_heads != details.kv_heads) {
      return BadArgument(StrCat("chunks[", i, "].kv_heads"), meta->kv_heads,
                         StrCat("those before it have ", details.kv_heads));
    }
    details.kv_heads = meta->kv_heads;
    details.task.tokens += meta->tokens;
    details.task.max_shard_tokens = std::max(details.task.max_shard_tokens, meta->tokens);
    largest = std::max(largest, meta->bytes);
    details.chunks.push_back(*std::move(key));
  }
  return largest;
}

absl::StatusOr<AttendStream::Answer> AttendStream::Work(Object& object) {
  const AttendDetails& details = object.details;
  absl::StatusOr<std::vector<float>> q = ToQueries(details, object.body);
  if (!q.ok()) {
    return q.status();
  }
  std::unique_ptr<AttendSink> sink = MakeAttendSink(details.task);
  uint64_t tokens = 0;
  for (const store::ChunkKey& key : details.chunks) {
    if (gone()) {
      return absl::CancelledError("the client is gone");
    }
    KVSHRINK_RETURN_IF_ERROR(AddChunk(details, key, q->data(), &tokens, sink.get()));
  }
  Answer answer = WithBody(object, sink->Take());
  v1::AttendAnswer* header = answer.message.mutable_header();
  header->set_body_bytes(answer.body_bytes);
  header->set_tokens(static_cast<uint32_t>(tokens));
  header->set_top_k(details.task.top_k);
  return answer;
}

absl::Status AttendStream::AddChunk(const AttendDetails& details, const store::ChunkKey& key,
                                    const float* q, uint64_t* tokens, AttendSink* sink) const {
  v1::ChunkId id;
  id.set_key(key.key);
  absl::StatusOr<store::FoundShard> found = env_.store->Get(key, details.layer);
  if (!found.ok()) {
    return InChunk(id, found.status());
  }
  absl::StatusOr<Shard> shard = Shard::Parse(*found->bytes);
  absl::Status status = shard.status();
  if (shard.ok()) {
    const TensorShape& shape = shard->header().shape;
    if (shape.kv_heads != details.kv_heads || shape.head_dim != details.task.head_dim ||
        *tokens + shape.tokens > details.task.tokens ||
        shape.tokens > details.task.max_shard_tokens) {
      return InChunk(id, absl::AbortedError("was replaced while the request came in"));
    }
    *tokens += shape.tokens;
    status = sink->Add(*env_.backend, *shard, q, env_.bases->Of(shard->header()));
  }
  if (absl::IsDataLoss(status)) {
    env_.store->ReportDamaged(key);
    spdlog::error("shard_damaged namespace={} key={} layer={} error=\"{}\"",
                  Printable(key.name_space), Printable(key.key), details.layer,
                  std::string(status.message()));
  }
  return status.ok() ? status : InChunk(id, status);
}

}  // namespace kvshrink::service
