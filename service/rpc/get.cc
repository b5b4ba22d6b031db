#include "service/rpc/get.h"

#include <algorithm>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "service/observe/log.h"
#include "service/rpc/limits.h"
#include "service/rpc/tenant.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {
namespace {

constexpr size_t kAnswersAhead = 2;  // one that is written, one that waits

absl::Status CheckAscending(const google::protobuf::RepeatedField<uint32_t>& values,
                            std::string_view field, uint32_t limit) {
  for (int i = 0; i < values.size(); ++i) {
    const std::string name = StrCat(field, "[", i, "]");
    if (values[i] >= limit) {
      return BadArgument(name, values[i], StrCat("must be below ", limit));
    }
    if (i > 0 && values[i] <= values[i - 1]) {
      return BadArgument(name, values[i], StrCat("must be above ", field, "[", i - 1, "]"));
    }
  }
  return absl::OkStatus();
}

TensorShape PickedShape(const v1::GetRequest& request, TensorShape shape) {
  if (request.kv_heads_size() > 0) {
    shape.kv_heads = static_cast<uint32_t>(request.kv_heads_size());
  }
  return shape;
}

absl::StatusOr<TensorPlan> PlanOf(const v1::GetRequest& request, const TensorShape& shape,
                                  bool keys_only, DType original, uint64_t max_bytes) {
  const DType dtype =
      request.dtype() == v1::DTYPE_UNSPECIFIED ? original : *ToDType(request.dtype(), "dtype");
  return PlanOutput(dtype, request.layout(), PickedShape(request, shape), keys_only, max_bytes);
}

}  // namespace

GetStream::GetStream(Environment& env, grpc::CallbackServerContext* context)
    : BidiStream(env, context, "Get", Pace{1, 1}), tenant_(TenantOf(*context)) {}

absl::Status GetStream::OnMessage(v1::GetRequest& request) {
  absl::Status status = Check(request);
  std::shared_ptr<Ticket> ticket;
  if (status.ok()) {
    absl::StatusOr<Ticket> admitted = env_.admission->Admit(LargestAnswerBytes(request));
    status = admitted.status();
    if (admitted.ok()) {
      ticket = std::make_shared<Ticket>(*std::move(admitted));
    }
  }
  if (!status.ok()) {
    Answer answer = ErrorAnswer(request, status);
    answer.last = true;
    Send(std::move(answer));
    return absl::OkStatus();
  }
  auto progress = std::make_shared<Progress>();
  progress->request.Swap(&request);
  progress->ticket = std::move(ticket);
  BeginWork(0);
  {
    absl::MutexLock lock(&progress_mu_);
    progress_ = std::move(progress);
  }
  Pump();
  return absl::OkStatus();
}

absl::Status GetStream::Check(const v1::GetRequest& request) const {
  if (env_.draining) {
    return absl::UnavailableError("the daemon is draining");
  }
  if (!request.source().empty()) {
    return absl::UnimplementedError(
        "field 'source' is set: pulling from another daemon is not enabled");
  }
  if (request.chunks_size() == 0 || request.chunks_size() > kMaxChunksPerRequest) {
    return BadArgument("chunks", StrCat(request.chunks_size(), " chunks"),
                       StrCat("must be 1..", kMaxChunksPerRequest));
  }
  for (int i = 0; i < request.chunks_size(); ++i) {
    KVSHRINK_RETURN_IF_ERROR(
        ToChunkKey(tenant_, request.chunks(i), StrCat("chunks[", i, "]")).status());
  }
  KVSHRINK_RETURN_IF_ERROR(CheckAscending(request.layers(), "layers", kMaxLayers));
  if (request.form() < v1::GET_FORM_SHARD || request.form() > v1::GET_FORM_LOW_RANK) {
    return BadArgument("form", static_cast<int>(request.form()),
                       "must be GET_FORM_SHARD, GET_FORM_DECODED or GET_FORM_LOW_RANK");
  }
  if (request.form() != v1::GET_FORM_DECODED) {
    if (request.kv_heads_size() > 0) {
      return BadArgument("kv_heads", StrCat(request.kv_heads_size(), " heads"),
                         "must be empty but for GET_FORM_DECODED");
    }
    return absl::OkStatus();
  }
  KVSHRINK_RETURN_IF_ERROR(CheckAscending(request.kv_heads(), "kv_heads", kMaxKvHeads));
  if (request.dtype() != v1::DTYPE_UNSPECIFIED) {
    KVSHRINK_RETURN_IF_ERROR(ToDType(request.dtype(), "dtype").status());
  }
  return CheckLayout(request.layout(), "layout");
}

uint64_t GetStream::LargestAnswerBytes(const v1::GetRequest& request) const {
  uint64_t largest = 0;
  for (const v1::ChunkId& id : request.chunks()) {
    absl::StatusOr<store::ChunkKey> key = ToChunkKey(tenant_, id, "chunk");
    absl::StatusOr<store::ChunkStat> stat = env_.store->Stat(*key);
    if (!stat.ok()) {
      continue;  // its answer will be an error
    }
    for (const store::ShardMeta& meta : stat->shards) {
      largest = std::max(largest, AnswerBytes(request, meta));
    }
  }
  return largest * kAnswersAhead;
}

uint64_t GetStream::AnswerBytes(const v1::GetRequest& request, const store::ShardMeta& meta) const {
  if (request.form() != v1::GET_FORM_DECODED) {
    return meta.bytes;
  }
  const TensorShape shape{meta.tokens, meta.kv_heads, meta.head_dim};
  absl::StatusOr<TensorPlan> plan =
      PlanOf(request, shape, meta.keys_only, static_cast<DType>(meta.dtype), env_.max_object_bytes);
  if (!plan.ok()) {
    return meta.bytes;
  }
  // Picking heads decodes all of them first.
  const uint64_t all =
      request.kv_heads_size() > 0 ? PackedBytes(shape, plan->dtype, meta.keys_only) : 0;
  return meta.bytes + plan->bytes + all;
}

void GetStream::Pump() {
  {
    absl::MutexLock lock(&progress_mu_);
    if (progress_ == nullptr || running_ || answers() >= kAnswersAhead) {
      return;
    }
    running_ = true;
  }
  Submit([this] { RunNext(); });
}

void GetStream::RunNext() {
  std::shared_ptr<Progress> progress;
  {
    absl::MutexLock lock(&progress_mu_);
    progress = progress_;
  }
  const absl::Time start = absl::Now();
  Answer answer = Next(*progress);
  const bool ends = answer.last;
  env_.metrics->ObjectDone(rpc_,
                           static_cast<absl::StatusCode>(answer.message.header().status().code()),
                           absl::Now() - start);
  Send(std::move(answer));
  {
    absl::MutexLock lock(&progress_mu_);
    running_ = false;
    if (ends) {
      progress_ = nullptr;
    }
  }
  if (ends) {
    EndWork(0);
  } else {
    Pump();
  }
}

GetStream::Answer GetStream::Next(Progress& progress) {
  const v1::ChunkId& id = progress.request.chunks(progress.chunk);
  absl::Status status = FindLayers(progress);
  absl::StatusOr<Answer> answer = Answer();
  if (!status.ok()) {
    answer = status;
  } else {
    const uint32_t layer = progress.layers[progress.layer];
    answer = Load(progress, *ToChunkKey(tenant_, id, "chunk"), layer);
  }
  const uint32_t layer = progress.layers.empty() ? 0 : progress.layers[progress.layer];
  if (!answer.ok()) {
    status = answer.status();
    answer = ErrorAnswer(progress.request, status);
    answer->message.mutable_header()->mutable_shard()->set_layer(layer);
  }
  answer->message.set_request_id(progress.request.request_id());
  *answer->message.mutable_header()->mutable_chunk() = id;
  answer->keep = progress.ticket;
  // One error speaks for the rest of its chunk.
  if (!status.ok() || ++progress.layer == progress.layers.size()) {
    ++progress.chunk;
    progress.layer = 0;
    progress.layers.clear();
  }
  answer->last = progress.chunk == progress.request.chunks_size();
  return *std::move(answer);
}

absl::Status GetStream::FindLayers(Progress& progress) const {
  if (!progress.layers.empty()) {
    return absl::OkStatus();
  }
  absl::StatusOr<store::ChunkKey> key =
      ToChunkKey(tenant_, progress.request.chunks(progress.chunk), "chunk");
  absl::StatusOr<store::ChunkStat> stat = env_.store->Stat(*key);
  if (!stat.ok()) {
    return stat.status();
  }
  if (!stat->committed) {
    return absl::NotFoundError("the chunk is not committed");
  }
  const auto& wanted = progress.request.layers();
  if (!wanted.empty() && wanted[wanted.size() - 1] >= stat->layers) {
    return BadArgument("layers", wanted[wanted.size() - 1],
                       StrCat("the chunk has ", stat->layers, " layers"));
  }
  progress.layers.assign(wanted.begin(), wanted.end());
  for (uint32_t layer = 0; wanted.empty() && layer < stat->layers; ++layer) {
    progress.layers.push_back(layer);
  }
  return absl::OkStatus();
}

absl::StatusOr<GetStream::Answer> GetStream::Load(const Progress& progress,
                                                  const store::ChunkKey& key, uint32_t layer) {
  absl::StatusOr<store::FoundShard> found = env_.store->Get(key, layer);
  if (!found.ok()) {
    return found.status();
  }
  absl::StatusOr<Shard> shard = Shard::Parse(*found->bytes);
  absl::StatusOr<Answer> answer = Answer();
  if (!shard.ok()) {
    answer = shard.status();
  } else if (shard->header().layer != layer) {
    answer = BadShard("layer", shard->header().layer, StrCat("it was stored as layer ", layer));
  } else if (progress.request.form() == v1::GET_FORM_DECODED) {
    answer = Decode(progress, *shard, *found->bytes);
  } else {
    answer->body = found->bytes;
    answer->body_bytes = progress.request.form() == v1::GET_FORM_LOW_RANK ? shard->preview_bytes()
                                                                          : found->bytes->size();
  }
  if (absl::IsDataLoss(answer.status())) {
    env_.store->ReportDamaged(key);
    spdlog::error("shard_damaged namespace={} key={} layer={} error=\"{}\"",
                  Printable(key.name_space), Printable(key.key), layer,
                  std::string(answer.status().message()));
  }
  if (!answer.ok()) {
    return answer.status();
  }
  v1::GetHeader* header = answer->message.mutable_header();
  header->mutable_status();
  header->set_body_bytes(answer->body_bytes);
  header->set_tier(FromTier(found->tier));
  FillShardInfo(MetaOf(shard->header(), found->bytes->size()), header->mutable_shard());
  return answer;
}

absl::StatusOr<GetStream::Answer> GetStream::Decode(const Progress& progress, const Shard& shard,
                                                    std::string_view bytes) {
  const v1::GetRequest& request = progress.request;
  absl::StatusOr<TensorPlan> plan = PlanOf(request, shard.header().shape, shard.header().keys_only,
                                           shard.header().dtype, env_.max_object_bytes);
  if (!plan.ok()) {
    return plan.status();
  }
  const std::vector<uint32_t> heads(request.kv_heads().begin(), request.kv_heads().end());
  absl::StatusOr<DecodedShard> decoded = env_.codec->Decode(shard, bytes, DecodeForm::kFull, *plan,
                                                            heads, env_.bases->Of(shard.header()));
  if (!decoded.ok()) {
    return decoded.status();
  }
  env_.metrics->CodecRan(rpc_, decoded->ran_on);
  Answer answer;
  answer.body_bytes = decoded->body.size();
  answer.body = std::make_shared<const std::string>(std::move(decoded->body));
  FillTensorSpec(*plan, request.layout().order(),
                 answer.message.mutable_header()->mutable_tensor());
  return answer;
}

GetStream::Answer GetStream::ErrorAnswer(const v1::GetRequest& request,
                                         const absl::Status& status) const {
  Answer answer;
  answer.message.set_request_id(request.request_id());
  FillStatus(status, env_.admission->retry_after_ms(),
             answer.message.mutable_header()->mutable_status());
  return answer;
}

}  // namespace kvshrink::service
