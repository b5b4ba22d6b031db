// Arena: one range of memory, taken at start, handed out by the piece. It deals in offsets alone,
// so that the memory can be a device's.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

#include "absl/synchronization/mutex.h"

namespace kvshrink::service {

// Thread-safe.
class Arena {
 public:
  // What all offsets and sizes are multiples of.
  static constexpr uint64_t kAlignment = 256;

  // A piece; given back when destroyed.
  class Piece {
   public:
    Piece(Arena* arena, uint64_t offset) : arena_(arena), offset_(offset) {}
    Piece(Piece&& other) noexcept;
    Piece& operator=(Piece&&) = delete;
    ~Piece();
    uint64_t offset() const { return offset_; }

   private:
    Arena* arena_;
    uint64_t offset_;
  };

  explicit Arena(uint64_t capacity_bytes) : capacity_bytes_(capacity_bytes) {}

  // Waits until `bytes` are free in one piece, first come, first served. None when the arena
  // is smaller than that; 0 bytes count as one.
  std::optional<Piece> Take(uint64_t bytes);

  uint64_t capacity_bytes() const { return capacity_bytes_; }
  // Calls that wait in Take().
  uint64_t waiting() const;

 private:
  // The lowest place where `bytes` are free.
  std::optional<uint64_t> FindPlace(uint64_t bytes) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void GiveBack(uint64_t offset);

  const uint64_t capacity_bytes_;
  mutable absl::Mutex mu_;
  std::map<uint64_t, uint64_t> taken_ ABSL_GUARDED_BY(mu_);  // offset -> one past the end
  uint64_t next_turn_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t turn_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace kvshrink::service
