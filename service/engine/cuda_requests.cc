#include "service/engine/cuda_requests.h"

#include <algorithm>
#include <cstddef>

#include "kvshrink/error.h"

namespace kvshrink::service {
namespace {

constexpr uint64_t kRowAlignment = 16;  // bytes, of a token's row: the encoder's loads

KindReport ReportOf(const cuda::EncodeKindReport& kind, uint64_t entries) {
  KindReport report;
  report.entries = entries;
  report.bytes = kind.bytes;
  report.error_energy = kind.error_energy;
  report.energy = kind.energy;
  report.blocks = kind.blocks;
  report.raw_blocks = kind.raw_blocks;
  report.escalated_blocks = kind.escalated_blocks;
  report.max_block_relative_error = kind.max_block_relative_error;
  std::copy(std::begin(kind.rank_histogram), std::end(kind.rank_histogram),
            report.rank_histogram.begin());
  return report;
}

}  // namespace

bool DeviceEncodes(const cuda::CudaEncodeApi& api, const TensorPlan& plan,
                   const EncodeOptions& options) {
  const uint64_t strides =
      plan.layout.page_stride | plan.layout.token_stride | plan.layout.head_stride;
  const bool rows_aligned = (strides * DTypeBytes(plan.dtype)) % kRowAlignment == 0 &&
                            plan.v_offset_bytes % kRowAlignment == 0;
  return rows_aligned && !plan.keys_only && !options.rope.has_value() &&
         options.bits_per_entry == 0 && api.supported(BatchOf(plan, options));
}

bool DeviceDecodes(const ShardHeader& header, const TensorPlan& plan,
                   std::span<const uint32_t> kv_heads) {
  // The device has no decoder of trellises.
  const bool trellis = GetProfileInfo(header.profile).code >= BlockCode::kTrellis15;
  const bool heads_exist = kv_heads.empty() || kv_heads.back() < header.shape.kv_heads;
  return !trellis && plan.dtype != DType::kFp8E4m3 && heads_exist && !header.keys_only &&
         !header.extensions.rope.has_value() && !header.extensions.basis.has_value();
}

cuda::EncodeBatch BatchOf(const TensorPlan& plan, const EncodeOptions& options) {
  cuda::EncodeBatch batch;
  batch.profile = options.profile;
  batch.dtype = plan.dtype;
  batch.kv_heads = plan.shape.kv_heads;
  batch.head_dim = plan.shape.head_dim;
  batch.jobs = 1;
  batch.max_tokens = plan.shape.tokens;
  batch.max_relative_error = options.max_relative_error;
  return batch;
}

cuda::EncodeTensor TensorAt(const std::byte* data, const TensorLayout& layout) {
  cuda::EncodeTensor tensor;
  tensor.data = data;
  tensor.page_tokens = layout.page_tokens;
  tensor.page_stride = layout.page_stride;
  tensor.token_stride = layout.token_stride;
  tensor.head_stride = layout.head_stride;
  return tensor;
}

ShardReport DeviceReport(const TensorPlan& plan, const cuda::EncodeReport& made) {
  ShardReport report;
  report.raw_bytes = PackedBytes(plan.shape, plan.dtype, plan.keys_only);
  report.encoded_bytes = made.bytes;
  report.k = ReportOf(made.kind[0], plan.shape.entries());
  report.v = ReportOf(made.kind[1], plan.shape.entries());
  return report;
}

absl::Status CheckMade(std::string_view bytes, const TensorPlan& plan,
                       const EncodeOptions& options) {
  const absl::StatusOr<Shard> shard = Shard::Parse(bytes);
  if (!shard.ok()) {
    return absl::InternalError(StrCat("a shard that it made is bad: ", shard.status().message()));
  }
  const ShardHeader& header = shard->header();
  const bool as_asked = header.profile == options.profile && header.dtype == plan.dtype &&
                        header.shape == plan.shape && header.layer == options.layer &&
                        header.first_token == options.first_token &&
                        header.raw_rows == RawRows(options, plan.shape.tokens) && !header.padded &&
                        !header.keys_only && !header.extensions.rope.has_value();
  return as_asked ? absl::OkStatus()
                  : absl::InternalError("a shard that it made has another header than asked for");
}

std::vector<HeadRun> RunsOf(uint32_t all_heads, std::span<const uint32_t> picked) {
  if (picked.empty()) {
    return {{0, all_heads, 0}};
  }
  std::vector<HeadRun> runs;
  for (uint32_t i = 0; i < picked.size(); ++i) {
    if (runs.empty() || runs.back().end != picked[i]) {
      runs.push_back({picked[i], picked[i], i});
    }
    ++runs.back().end;
  }
  return runs;
}

cuda::CudaTarget TargetOf(const HeadRun& run, const TensorPlan& plan, std::byte* output) {
  const uint64_t head_bytes = plan.layout.head_stride * DTypeBytes(plan.dtype);
  std::byte* k = output + static_cast<std::ptrdiff_t>(run.place * head_bytes) -
                 static_cast<std::ptrdiff_t>(run.begin * head_bytes);
  cuda::CudaTarget target;
  target.k = k;
  target.v = k + plan.v_offset_bytes;
  return target;
}

}  // namespace kvshrink::service
