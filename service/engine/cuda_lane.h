// CudaLane: a stream and page-locked staging memory: the way of one thread to the device and back.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kvshrink/cuda_api.h"

namespace kvshrink::service {

// For one thread at a time. Errors are those of CUDA, INTERNAL; after one, what the stream still
// does is unknown.
class CudaLane {
 public:
  static absl::StatusOr<std::unique_ptr<CudaLane>> Make(const cuda::CudaApi& api);
  ~CudaLane();
  CudaLane(const CudaLane&) = delete;
  CudaLane& operator=(const CudaLane&) = delete;

  void* stream() const { return stream_; }

  // Has read all of `host` when it returns; the device has it when the stream has got so far.
  absl::Status Upload(void* device, const void* host, uint64_t bytes);
  // Waits until `host` is filled.
  absl::Status Download(void* host, const void* device, uint64_t bytes);
  absl::Status Clear(void* device, uint64_t bytes);

  static constexpr uint64_t kStagingBytes = uint64_t{4} << 20;

 private:
  // So many copies are on their way while the next is filled or the last emptied.
  static constexpr size_t kPieces = 4;
  static constexpr uint64_t kPieceBytes = kStagingBytes / kPieces;

  struct StagingPiece {
    std::byte* bytes = nullptr;
    void* passed = nullptr;  // event: the copy that used the piece is done
    bool in_flight = false;
  };

  explicit CudaLane(const cuda::CudaApi& api) : api_(api) {}
  absl::Status SetUp();
  // Copies on the stream and marks the piece.
  absl::Status Copy(StagingPiece& piece, void* to, const void* from, uint64_t bytes);
  absl::Status AwaitPiece(StagingPiece& piece);
  StagingPiece& NextPiece() { return pieces_[next_++ % kPieces]; }

  const cuda::CudaApi& api_;
  void* stream_ = nullptr;
  void* staging_ = nullptr;
  std::array<StagingPiece, kPieces> pieces_;
  size_t next_ = 0;
};

// Lanes that wait for a thread. Thread-safe.
class CudaLanePool {
 public:
  // A lane; goes back when destroyed.
  class Lease {
   public:
    Lease(CudaLanePool* pool, std::unique_ptr<CudaLane> lane);
    Lease(Lease&&) = default;
    ~Lease();
    CudaLane& operator*() const { return *lane_; }
    CudaLane* operator->() const { return lane_.get(); }

   private:
    CudaLanePool* pool_;
    std::unique_ptr<CudaLane> lane_;
  };

  static absl::StatusOr<std::unique_ptr<CudaLanePool>> Make(const cuda::CudaApi& api, int lanes);

  // Waits while all are taken.
  Lease Take();

 private:
  void GiveBack(std::unique_ptr<CudaLane> lane);

  absl::Mutex mu_;
  std::vector<std::unique_ptr<CudaLane>> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvshrink::service
