#include "service/engine/cuda_lane.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kvshrink/cuda.h"
#include "kvshrink/error.h"

namespace kvshrink::service {

absl::StatusOr<std::unique_ptr<CudaLane>> CudaLane::Make(const cuda::CudaApi& api) {
  std::unique_ptr<CudaLane> lane(new CudaLane(api));
  KVSHRINK_RETURN_IF_ERROR(lane->SetUp());
  return lane;
}

absl::Status CudaLane::SetUp() {
  const cuda::CudaRuntimeApi& runtime = *api_.runtime;
  KVSHRINK_RETURN_IF_ERROR(
      cuda::ToStatus(api_, runtime.create_stream(&stream_), "creating a stream"));
  KVSHRINK_RETURN_IF_ERROR(cuda::ToStatus(api_, runtime.allocate_host(&staging_, kStagingBytes),
                                          "taking page-locked memory"));
  for (size_t i = 0; i < kPieces; ++i) {
    pieces_[i].bytes = static_cast<std::byte*>(staging_) + i * kPieceBytes;
    KVSHRINK_RETURN_IF_ERROR(
        cuda::ToStatus(api_, runtime.create_event(&pieces_[i].passed), "creating an event"));
  }
  return absl::OkStatus();
}

// What fails here has nobody to tell: the device is lost, or the process ends.
CudaLane::~CudaLane() {
  const cuda::CudaRuntimeApi& runtime = *api_.runtime;
  if (stream_ != nullptr) {
    (void)runtime.synchronize(stream_);
  }
  for (const StagingPiece& piece : pieces_) {
    if (piece.passed != nullptr) {
      (void)runtime.destroy_event(piece.passed);
    }
  }
  if (staging_ != nullptr) {
    (void)runtime.release_host(staging_);
  }
  if (stream_ != nullptr) {
    (void)runtime.destroy_stream(stream_);
  }
}

absl::Status CudaLane::Copy(StagingPiece& piece, void* to, const void* from, uint64_t bytes) {
  const cuda::CudaRuntimeApi& runtime = *api_.runtime;
  KVSHRINK_RETURN_IF_ERROR(cuda::ToStatus(api_, runtime.copy(to, from, bytes, stream_), "copying"));
  piece.in_flight = true;
  return cuda::ToStatus(api_, runtime.record_event(piece.passed, stream_), "recording an event");
}

absl::Status CudaLane::AwaitPiece(StagingPiece& piece) {
  if (!std::exchange(piece.in_flight, false)) {
    return absl::OkStatus();
  }
  return cuda::ToStatus(api_, api_.runtime->await_event(piece.passed), "waiting for the device");
}

absl::Status CudaLane::Upload(void* device, const void* host, uint64_t bytes) {
  for (uint64_t at = 0; at < bytes; at += kPieceBytes) {
    const uint64_t count = std::min(kPieceBytes, bytes - at);
    StagingPiece& piece = NextPiece();
    KVSHRINK_RETURN_IF_ERROR(AwaitPiece(piece));
    std::memcpy(piece.bytes, static_cast<const std::byte*>(host) + at, count);
    KVSHRINK_RETURN_IF_ERROR(Copy(piece, static_cast<std::byte*>(device) + at, piece.bytes, count));
  }
  return absl::OkStatus();
}

absl::Status CudaLane::Download(void* host, const void* device, uint64_t bytes) {
  const uint64_t copies = (bytes + kPieceBytes - 1) / kPieceBytes;
  const auto bytes_of = [bytes](uint64_t i) {
    return std::min(kPieceBytes, bytes - i * kPieceBytes);
  };
  const size_t first = next_;
  uint64_t asked = 0;
  for (uint64_t i = 0; i < copies; ++i) {
    for (; asked < copies && asked < i + kPieces; ++asked) {
      StagingPiece& piece = NextPiece();
      KVSHRINK_RETURN_IF_ERROR(AwaitPiece(piece));
      KVSHRINK_RETURN_IF_ERROR(Copy(piece, piece.bytes,
                                    static_cast<const std::byte*>(device) + asked * kPieceBytes,
                                    bytes_of(asked)));
    }
    StagingPiece& piece = pieces_[(first + i) % kPieces];
    KVSHRINK_RETURN_IF_ERROR(AwaitPiece(piece));
    std::memcpy(static_cast<std::byte*>(host) + i * kPieceBytes, piece.bytes, bytes_of(i));
  }
  return absl::OkStatus();
}

absl::Status CudaLane::Clear(void* device, uint64_t bytes) {
  return cuda::ToStatus(api_, api_.runtime->clear(device, bytes, stream_), "clearing");
}

CudaLanePool::Lease::Lease(CudaLanePool* pool, std::unique_ptr<CudaLane> lane)
    : pool_(pool), lane_(std::move(lane)) {}

CudaLanePool::Lease::~Lease() {
  if (lane_ != nullptr) {
    pool_->GiveBack(std::move(lane_));
  }
}

absl::StatusOr<std::unique_ptr<CudaLanePool>> CudaLanePool::Make(const cuda::CudaApi& api,
                                                                 int lanes) {
  auto pool = std::make_unique<CudaLanePool>();
  for (int i = 0; i < lanes; ++i) {
    absl::StatusOr<std::unique_ptr<CudaLane>> lane = CudaLane::Make(api);
    if (!lane.ok()) {
      return lane.status();
    }
    pool->GiveBack(*std::move(lane));
  }
  return pool;
}

CudaLanePool::Lease CudaLanePool::Take() {
  absl::MutexLock lock(&mu_);
  const auto any = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !free_.empty(); };
  mu_.Await(absl::Condition(&any));
  Lease lease(this, std::move(free_.back()));
  free_.pop_back();
  return lease;
}

void CudaLanePool::GiveBack(std::unique_ptr<CudaLane> lane) {
  absl::MutexLock lock(&mu_);
  free_.push_back(std::move(lane));
}

}  // namespace kvshrink::service
