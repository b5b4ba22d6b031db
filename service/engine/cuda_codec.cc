#include "service/engine/cuda_codec.h"

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "kvshrink/cuda.h"
#include "kvshrink/cuda_encode.h"
#include "kvshrink/error.h"
#include "service/engine/arena.h"
#include "service/engine/cuda_lane.h"
#include "service/engine/cuda_requests.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {
namespace {

constexpr std::string_view kName = "cuda";

// An object that the device leaves to the CPU; no failure.
absl::Status NotForDevice(const char* why) { return absl::UnimplementedError(why); }

// Places one behind the other, each at a multiple of the arena's alignment.
class Plot {
 public:
  uint64_t Add(uint64_t bytes) {
    const uint64_t at = bytes_;
    bytes_ += (bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
    return at;
  }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t bytes_ = 0;
};

class CudaCodec final : public Codec {
 public:
  CudaCodec(const cuda::CudaApi& api, std::string device, std::unique_ptr<CudaLanePool> lanes,
            std::byte* memory, uint64_t memory_bytes, const Backend& cpu)
      : api_(api),
        device_(std::move(device)),
        cpu_(MakeCpuCodec(cpu)),
        memory_(memory),
        arena_(memory_bytes),
        lanes_(std::move(lanes)) {}

  ~CudaCodec() override {
    lanes_.reset();  // waits for their streams
    (void)api_.runtime->release(memory_);
  }

  std::string_view backend() const override { return kName; }
  std::string device() const override { return device_; }
  CodecHealth health() const override { return {.has_device = true, .lost = lost_}; }

  absl::StatusOr<EncodedTensor> Encode(const TensorPlan& plan, std::string_view body,
                                       const EncodeOptions& options) override {
    if (!lost_ && DeviceEncodes(*api_.encode, plan, options)) {
      absl::StatusOr<EncodedTensor> encoded = EncodeOnDevice(plan, body, options);
      if (encoded.ok()) {
        return encoded;
      }
      Judge(encoded.status());
    }
    return cpu_->Encode(plan, body, options);
  }

  absl::StatusOr<DecodedShard> Decode(const Shard& shard, std::string_view bytes, DecodeForm form,
                                      const TensorPlan& plan, std::span<const uint32_t> kv_heads,
                                      const Basis* basis) override {
    if (!lost_ && DeviceDecodes(shard.header(), plan, kv_heads)) {
      absl::StatusOr<DecodedShard> decoded =
          DecodeOnDevice(shard.header(), bytes, form, plan, kv_heads);
      if (decoded.ok()) {
        return decoded;
      }
      Judge(decoded.status());
    }
    return cpu_->Decode(shard, bytes, form, plan, kv_heads, basis);
  }

 private:
  absl::StatusOr<EncodedTensor> EncodeOnDevice(const TensorPlan& plan, std::string_view body,
                                               const EncodeOptions& options);
  absl::StatusOr<DecodedShard> DecodeOnDevice(const ShardHeader& header, std::string_view bytes,
                                              DecodeForm form, const TensorPlan& plan,
                                              std::span<const uint32_t> kv_heads);

  // Every error of the device but a refusal is the end of its use: after one, no later result is to
  // be trusted.
  void Judge(const absl::Status& status) {
    if (absl::IsUnimplemented(status) || absl::IsInvalidArgument(status) || lost_.exchange(true)) {
      return;
    }
    spdlog::error("device_lost device=\"{}\" error=\"{}\" now=cpu", device_, status.ToString());
  }

  // A place in the arena and a lane. Having waited for them, the device may be lost.
  struct Room {
    Arena::Piece piece;
    CudaLanePool::Lease lane;
  };
  absl::StatusOr<Room> TakeRoom(uint64_t bytes) {
    std::optional<Arena::Piece> piece = arena_.Take(bytes);
    if (!piece.has_value()) {
      return NotForDevice("the object needs more than device-bytes");
    }
    Room room{*std::move(piece), lanes_->Take()};
    if (lost_) {
      return NotForDevice("the device is lost");
    }
    return room;
  }
  std::byte* At(const Room& room, uint64_t offset) const {
    return memory_ + room.piece.offset() + offset;
  }

  const cuda::CudaApi& api_;
  const std::string device_;
  const std::unique_ptr<Codec> cpu_;
  std::byte* const memory_;  // the device's
  Arena arena_;
  std::unique_ptr<CudaLanePool> lanes_;
  std::atomic<bool> lost_ = false;
};

absl::StatusOr<EncodedTensor> CudaCodec::EncodeOnDevice(const TensorPlan& plan,
                                                        std::string_view body,
                                                        const EncodeOptions& options) {
  cuda::EncodeBatch batch = BatchOf(plan, options);
  const uint64_t capacity = api_.encode->max_shard_bytes(batch, plan.shape.tokens);
  const uint64_t workspace_bytes = api_.encode->workspace_bytes(batch);
  Plot plot;
  const uint64_t tensors = plot.Add(plan.bytes);
  const uint64_t job_at = plot.Add(sizeof(cuda::EncodeJob));
  const uint64_t report_at = plot.Add(sizeof(cuda::EncodeReport));
  const uint64_t shard_at = plot.Add(capacity);
  const uint64_t workspace = plot.Add(workspace_bytes);
  absl::StatusOr<Room> room = TakeRoom(plot.bytes());
  if (!room.ok()) {
    return room.status();
  }
  CudaLane& lane = *room->lane;

  cuda::EncodeJob job;
  job.k = TensorAt(At(*room, tensors), plan.layout);
  job.v = TensorAt(At(*room, tensors) + plan.v_offset_bytes, plan.layout);
  job.tokens = plan.shape.tokens;
  job.raw_rows = RawRows(options, plan.shape.tokens);
  job.first_token = options.first_token;
  job.layer = options.layer;
  job.out = reinterpret_cast<uint8_t*>(At(*room, shard_at));
  job.capacity = capacity;
  batch.job_list = reinterpret_cast<const cuda::EncodeJob*>(At(*room, job_at));
  batch.report_list = reinterpret_cast<cuda::EncodeReport*>(At(*room, report_at));

  KVSHRINK_RETURN_IF_ERROR(lane.Upload(At(*room, tensors), body.data(), plan.bytes));
  KVSHRINK_RETURN_IF_ERROR(lane.Upload(At(*room, job_at), &job, sizeof(job)));
  KVSHRINK_RETURN_IF_ERROR(cuda::ToStatus(
      api_, api_.encode->encode(batch, At(*room, workspace), workspace_bytes, lane.stream()),
      "encoding"));
  cuda::EncodeReport report;
  KVSHRINK_RETURN_IF_ERROR(lane.Download(&report, batch.report_list, sizeof(report)));
  if (report.written == 0 || report.bytes > capacity) {
    return absl::InternalError(
        StrCat("a shard of ", report.bytes, " bytes came out where ", capacity, " are the most"));
  }
  EncodedTensor encoded{std::string(report.bytes, '\0'), DeviceReport(plan, report), kName};
  KVSHRINK_RETURN_IF_ERROR(
      lane.Download(encoded.shard.data(), At(*room, shard_at), encoded.shard.size()));
  KVSHRINK_RETURN_IF_ERROR(CheckMade(encoded.shard, plan, options));
  return encoded;
}

absl::StatusOr<DecodedShard> CudaCodec::DecodeOnDevice(const ShardHeader& header,
                                                       std::string_view bytes, DecodeForm form,
                                                       const TensorPlan& plan,
                                                       std::span<const uint32_t> kv_heads) {
  const std::vector<HeadRun> runs = RunsOf(header.shape.kv_heads, kv_heads);
  cuda::DecodeParams params;
  params.batch.shards = 1;
  params.batch.kv_heads = header.shape.kv_heads;
  params.batch.head_dim = header.shape.head_dim;
  params.batch.max_tokens = header.shape.tokens;
  const uint64_t view_bytes = api_.view_bytes(params.batch);
  // What the kernels read beside the shard, and write beside the tensors.
  struct Control {
    const void* bytes = nullptr;
    uint64_t size = 0;
    uint64_t status = 0;
  };
  Plot plot;
  const uint64_t shard_at = plot.Add(bytes.size());
  const uint64_t control_at = plot.Add(sizeof(Control));
  const uint64_t targets_at = plot.Add(runs.size() * sizeof(cuda::CudaTarget));
  const uint64_t view_at = plot.Add(view_bytes);
  const uint64_t output_at = plot.Add(plan.bytes);
  absl::StatusOr<Room> room = TakeRoom(plot.bytes());
  if (!room.ok()) {
    return room.status();
  }
  CudaLane& lane = *room->lane;

  const Control control{.bytes = At(*room, shard_at), .size = bytes.size()};
  std::vector<cuda::CudaTarget> targets;
  targets.reserve(runs.size());
  for (const HeadRun& run : runs) {
    targets.push_back(TargetOf(run, plan, At(*room, output_at)));
  }
  auto* device_control = reinterpret_cast<Control*>(At(*room, control_at));
  params.batch.bytes = &device_control->bytes;
  params.batch.sizes = &device_control->size;
  params.status = &device_control->status;
  params.view = At(*room, view_at);
  params.form = form;
  params.dtype = plan.dtype;
  params.layout = plan.layout;
  params.token_end = header.shape.tokens;

  KVSHRINK_RETURN_IF_ERROR(lane.Upload(At(*room, shard_at), bytes.data(), bytes.size()));
  KVSHRINK_RETURN_IF_ERROR(lane.Upload(device_control, &control, sizeof(control)));
  KVSHRINK_RETURN_IF_ERROR(lane.Upload(At(*room, targets_at), targets.data(),
                                       targets.size() * sizeof(cuda::CudaTarget)));
  if (plan.bytes != PackedBytes(plan.shape, plan.dtype, plan.keys_only)) {
    KVSHRINK_RETURN_IF_ERROR(lane.Clear(At(*room, output_at), plan.bytes));
  }
  const cuda::ParseParams parse{.batch = params.batch,
                                .view = At(*room, view_at),
                                .view_bytes = view_bytes,
                                .status = params.status};
  KVSHRINK_RETURN_IF_ERROR(cuda::ToStatus(api_, api_.parse(parse, lane.stream()), "parsing"));
  for (size_t i = 0; i < runs.size(); ++i) {
    params.targets = reinterpret_cast<const cuda::CudaTarget*>(At(*room, targets_at)) + i;
    params.head_begin = runs[i].begin;
    params.head_end = runs[i].end;
    KVSHRINK_RETURN_IF_ERROR(cuda::ToStatus(api_, api_.decode(params, lane.stream()), "decoding"));
  }
  uint64_t status = 0;
  KVSHRINK_RETURN_IF_ERROR(lane.Download(&status, params.status, sizeof(status)));
  if (status != 0) {
    // Damage, or what this kernel doesn't know: the CPU says which.
    return NotForDevice("the device doesn't take the shard");
  }
  DecodedShard decoded{std::string(plan.bytes, '\0'), kName};
  KVSHRINK_RETURN_IF_ERROR(
      lane.Download(decoded.body.data(), At(*room, output_at), decoded.body.size()));
  return decoded;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Codec>> MakeCudaCodec(const cuda::CudaApi& api,
                                                     const CudaCodecOptions& options,
                                                     const Backend& cpu) {
  cuda::CudaDeviceInfo info;
  KVSHRINK_RETURN_IF_ERROR(
      cuda::ToStatus(api, api.runtime->device_info(&info), "asking for the device"));
  if (info.free_bytes < options.device_bytes) {
    return absl::ResourceExhaustedError(StrCat("CUDA, ", info.name, ": of its memory ",
                                               info.free_bytes >> 20, " MiB are free, not the ",
                                               options.device_bytes >> 20, " MiB of device-bytes"));
  }
  absl::StatusOr<std::unique_ptr<CudaLanePool>> lanes = CudaLanePool::Make(api, options.lanes);
  if (!lanes.ok()) {
    return lanes.status();
  }
  void* memory = nullptr;
  KVSHRINK_RETURN_IF_ERROR(cuda::ToStatus(api, api.runtime->allocate(&memory, options.device_bytes),
                                          "taking device memory"));
  return std::make_unique<CudaCodec>(api, info.name, *std::move(lanes),
                                     static_cast<std::byte*>(memory), options.device_bytes, cpu);
}

}  // namespace kvshrink::service
