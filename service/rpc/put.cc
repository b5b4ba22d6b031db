#include "service/rpc/put.h"

#include <algorithm>

#include "service/engine/coding.h"
#include "service/rpc/limits.h"
#include "service/rpc/tenant.h"

namespace kvshrink::service {
namespace {

struct Coded {
  std::shared_ptr<const std::string> bytes;
  store::ShardMeta meta;
  ShardReport report;
};

absl::StatusOr<Coded> EncodeTensor(const Environment& env, const PutDetails& details,
                                   std::string_view body) {
  absl::StatusOr<EncodedTensor> encoded = env.codec->Encode(*details.tensor, body, details.options);
  if (!encoded.ok()) {
    return encoded.status();
  }
  env.metrics->Encoded(encoded->report);
  env.metrics->CodecRan("Put", encoded->ran_on);
  Coded coded;
  coded.report = encoded->report;
  ShardHeader header;
  header.profile = details.options.profile;
  header.dtype = details.tensor->dtype;
  header.shape = details.tensor->shape;
  header.first_token = details.options.first_token;
  header.layer = details.layer;
  header.keys_only = details.tensor->keys_only;
  coded.meta = MetaOf(header, encoded->shard.size());
  coded.bytes = std::make_shared<const std::string>(std::move(encoded->shard));
  return coded;
}

// A shard from outside: parsed, every block unpacked, and in agreement with its header.
absl::StatusOr<Coded> TakeShard(const Environment& env, const PutDetails& details,
                                std::string body) {
  Coded coded;
  coded.bytes = std::make_shared<const std::string>(std::move(body));
  absl::StatusOr<Shard> shard = Shard::Parse(*coded.bytes);
  if (!shard.ok()) {
    return AsCallersFault(shard.status());
  }
  if (shard->header().layer != details.layer) {
    return BadArgument("layer", details.layer,
                       StrCat("the shard itself says layer ", shard->header().layer));
  }
  KVSHRINK_RETURN_IF_ERROR(AsCallersFault(CheckBlocks(*env.backend, *shard)));
  coded.meta = MetaOf(shard->header(), shard->bytes());
  coded.report = ReportOf(*shard);
  return coded;
}

}  // namespace

PutStream::PutStream(Environment& env, grpc::CallbackServerContext* context)
    : ObjectStream(env, context, "Put",
                   {.max_works = static_cast<size_t>(std::max(4, 2 * env.executor->threads())),
                    .max_answers = 1024}),
      tenant_(TenantOf(*context)) {}

absl::StatusOr<Accepted<PutDetails>> PutStream::Check(const v1::PutHeader& header) {
  Accepted<PutDetails> accepted;
  PutDetails& details = accepted.details;
  absl::StatusOr<store::ChunkKey> key = ToChunkKey(tenant_, header.chunk(), "chunk");
  if (!key.ok()) {
    return key.status();
  }
  details.key = *std::move(key);
  if (header.layers() == 0 || header.layers() > kMaxLayers) {
    return BadArgument("layers", header.layers(), StrCat("must be 1..", kMaxLayers));
  }
  if (header.layer() >= header.layers()) {
    return BadArgument("layer", header.layer(), StrCat("must be below layers ", header.layers()));
  }
  details.layer = header.layer();
  details.layers = header.layers();
  KVSHRINK_RETURN_IF_ERROR(CheckContent(header, details));
  if (env_.store->uncommitted_bytes() >= env_.uncommitted_capacity_bytes) {
    return absl::ResourceExhaustedError(
        StrCat("shards of uncommitted chunks take all of ", env_.uncommitted_capacity_bytes,
               " bytes: commit or delete some, or wait until they expire"));
  }
  accepted.charge_bytes = header.body_bytes();
  if (details.tensor.has_value()) {
    const TensorPlan& tensor = *details.tensor;
    accepted.charge_bytes += EncodeBytes(tensor.shape, tensor.dtype, tensor.keys_only);
  }
  return accepted;
}

absl::Status PutStream::CheckContent(const v1::PutHeader& header, PutDetails& details) const {
  switch (header.content_case()) {
    case v1::PutHeader::kEncoded:
      if (header.has_encode()) {
        return absl::InvalidArgumentError(
            "field 'encode' is set: must be absent when the body is already a shard");
      }
      return absl::OkStatus();
    case v1::PutHeader::kTensor: {
      absl::StatusOr<EncodeOptions> options = ToEncodeOptions(header.encode(), header.layer());
      if (!options.ok()) {
        return options.status();
      }
      absl::StatusOr<TensorPlan> plan = PlanInput(header.tensor(), header.body_bytes());
      if (!plan.ok()) {
        return plan.status();
      }
      details.options = *options;
      details.tensor = *plan;
      KVSHRINK_RETURN_IF_ERROR(CheckFit(*options, plan->shape));
      return env_.bases->Choose(plan->shape, &details.options);
    }
    default:
      return absl::InvalidArgumentError("field 'content' is not set: must be tensor or encoded");
  }
}

absl::StatusOr<PutStream::Answer> PutStream::Work(Object& object) {
  const PutDetails& details = object.details;
  absl::StatusOr<Coded> coded = details.tensor.has_value()
                                    ? EncodeTensor(env_, details, object.body)
                                    : TakeShard(env_, details, std::move(object.body));
  if (!coded.ok()) {
    return coded.status();
  }
  absl::StatusOr<store::PutResult> put =
      env_.store->Put(details.key, details.layers, coded->meta, coded->bytes);
  if (!put.ok()) {
    return put.status();
  }
  Answer answer;
  answer.message.set_already_present(put->already_present);
  answer.message.set_tier(FromTier(put->tier));
  FillStats(coded->report, answer.message.mutable_stats());
  return answer;
}

}  // namespace kvshrink::service
