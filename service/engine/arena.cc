#include "service/engine/arena.h"

#include <algorithm>
#include <utility>

namespace kvshrink::service {

Arena::Piece::Piece(Piece&& other) noexcept
    : arena_(std::exchange(other.arena_, nullptr)), offset_(other.offset_) {}

Arena::Piece::~Piece() {
  if (arena_ != nullptr) {
    arena_->GiveBack(offset_);
  }
}

std::optional<Arena::Piece> Arena::Take(uint64_t bytes) {
  if (bytes > capacity_bytes_) {
    return std::nullopt;
  }
  const uint64_t whole = (std::max<uint64_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  if (whole > capacity_bytes_) {
    return std::nullopt;
  }
  absl::MutexLock lock(&mu_);
  const uint64_t turn = next_turn_++;
  const auto may_take = [this, turn, whole]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return turn_ == turn && FindPlace(whole).has_value();
  };
  mu_.Await(absl::Condition(&may_take));
  const uint64_t offset = *FindPlace(whole);
  taken_[offset] = offset + whole;
  ++turn_;
  return Piece(this, offset);
}

std::optional<uint64_t> Arena::FindPlace(uint64_t bytes) const {
  uint64_t free_from = 0;
  for (const auto& [offset, end] : taken_) {
    if (offset - free_from >= bytes) {
      return free_from;
    }
    free_from = end;
  }
  return capacity_bytes_ - free_from >= bytes ? std::optional(free_from) : std::nullopt;
}

uint64_t Arena::waiting() const {
  absl::MutexLock lock(&mu_);
  return next_turn_ - turn_;
}

void Arena::GiveBack(uint64_t offset) {
  absl::MutexLock lock(&mu_);
  taken_.erase(offset);
}

}  // namespace kvshrink::service
