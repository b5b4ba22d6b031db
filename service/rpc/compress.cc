#include "service/rpc/compress.h"

#include <algorithm>

namespace kvshrink::service {
namespace {

Pace PaceOf(const Environment& env) {
  return {.max_works = static_cast<size_t>(std::max(4, 2 * env.executor->threads())),
          .max_answers = 64};
}

}  // namespace

CompressStream::CompressStream(Environment& env, grpc::CallbackServerContext* context)
    : ObjectStream(env, context, "Compress", PaceOf(env)) {}

absl::StatusOr<Accepted<CompressDetails>> CompressStream::Check(const v1::CompressHeader& header) {
  absl::StatusOr<EncodeOptions> options = ToEncodeOptions(header.encode(), header.layer());
  if (!options.ok()) {
    return options.status();
  }
  absl::StatusOr<TensorPlan> plan = PlanInput(header.tensor(), header.body_bytes());
  if (!plan.ok()) {
    return plan.status();
  }
  KVSHRINK_RETURN_IF_ERROR(CheckFit(*options, plan->shape));
  KVSHRINK_RETURN_IF_ERROR(env_.bases->Choose(plan->shape, &*options));
  return Accepted<CompressDetails>{
      {*plan, *options},
      header.body_bytes() + EncodeBytes(plan->shape, plan->dtype, plan->keys_only)};
}

absl::StatusOr<CompressStream::Answer> CompressStream::Work(Object& object) {
  absl::StatusOr<EncodedTensor> encoded =
      env_.codec->Encode(object.details.tensor, object.body, object.details.options);
  if (!encoded.ok()) {
    return encoded.status();
  }
  env_.metrics->Encoded(encoded->report);
  env_.metrics->CodecRan(rpc_, encoded->ran_on);
  Answer answer = WithBody(object, std::move(encoded->shard));
  v1::CompressAnswer* header = answer.message.mutable_header();
  header->set_body_bytes(answer.body_bytes);
  FillStats(encoded->report, header->mutable_stats());
  return answer;
}

DecompressStream::DecompressStream(Environment& env, grpc::CallbackServerContext* context)
    : ObjectStream(env, context, "Decompress", PaceOf(env)) {}

absl::StatusOr<Accepted<DecompressDetails>> DecompressStream::Check(
    const v1::DecompressHeader& header) {
  if (header.dtype() != v1::DTYPE_UNSPECIFIED) {
    KVSHRINK_RETURN_IF_ERROR(ToDType(header.dtype(), "dtype").status());
  }
  KVSHRINK_RETURN_IF_ERROR(CheckLayout(header.layout(), "layout"));
  return Accepted<DecompressDetails>{{header.dtype(), header.layout(), header.low_rank()},
                                     header.body_bytes()};
}

absl::StatusOr<DecompressStream::Answer> DecompressStream::Work(Object& object) {
  const DecompressDetails& details = object.details;
  const Extent extent = details.low_rank ? Extent::kAllowPreview : Extent::kWhole;
  absl::StatusOr<Shard> shard = Shard::Parse(object.body, extent);
  if (!shard.ok()) {
    return AsCallersFault(shard.status());
  }
  const DType dtype = details.dtype == v1::DTYPE_UNSPECIFIED ? shard->header().dtype
                                                             : *ToDType(details.dtype, "dtype");
  absl::StatusOr<TensorPlan> plan = PlanOutput(dtype, details.layout, shard->header().shape,
                                               shard->header().keys_only, env_.max_object_bytes);
  if (!plan.ok()) {
    return plan.status();
  }
  // Only the shard says how large its tensors are: that part of the memory is asked for now.
  KVSHRINK_RETURN_IF_ERROR(object.ticket->GrowTo(object.charge_bytes + plan->bytes));
  absl::StatusOr<DecodedShard> decoded = env_.codec->Decode(
      *shard, object.body, details.low_rank ? DecodeForm::kLowRank : DecodeForm::kFull, *plan, {},
      env_.bases->Of(shard->header()));
  if (!decoded.ok()) {
    return AsCallersFault(decoded.status());
  }
  env_.metrics->CodecRan(rpc_, decoded->ran_on);
  Answer answer = WithBody(object, std::move(decoded->body));
  v1::DecompressAnswer* header = answer.message.mutable_header();
  header->set_body_bytes(answer.body_bytes);
  FillTensorSpec(*plan, details.layout.order(), header->mutable_tensor());
  FillShardInfo(MetaOf(shard->header(), shard->bytes()), header->mutable_shard());
  return answer;
}

}  // namespace kvshrink::service
