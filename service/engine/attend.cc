#include "service/engine/attend.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kvshrink/error.h"

namespace kvshrink::service {
namespace {

static_assert(std::endian::native == std::endian::little, "answers are sent as they lie in memory");

void Append(const void* data, size_t bytes, std::string* out) {
  out->append(static_cast<const char*>(data), bytes);
}

class AllScores final : public AttendSink {
 public:
  explicit AllScores(const AttendTask& task) : task_(task), body_(task.answer_bytes(), '\0') {}

  absl::Status Add(const Backend& backend, const Shard& shard, const float* q,
                   const Basis* basis) override {
    const size_t tokens = shard.header().shape.tokens;
    scratch_.resize(task_.rows() * tokens);
    KVSHRINK_RETURN_IF_ERROR(
        AttentionScores(backend, shard, task_.params, q, scratch_.data(), basis));
    for (size_t row = 0; row < task_.rows(); ++row) {
      std::memcpy(body_.data() + (row * task_.tokens + first_) * sizeof(float),
                  scratch_.data() + row * tokens, tokens * sizeof(float));
    }
    first_ += tokens;
    return absl::OkStatus();
  }

  std::string Take() override { return std::move(body_); }

 private:
  const AttendTask task_;
  std::string body_;
  std::vector<float> scratch_;
  size_t first_ = 0;  // index of the next shard's first token
};

class TopScores final : public AttendSink {
 public:
  explicit TopScores(const AttendTask& task) : task_(task), best_(task.rows() * task.top_k) {}

  absl::Status Add(const Backend& backend, const Shard& shard, const float* q,
                   const Basis* basis) override {
    const size_t tokens = shard.header().shape.tokens;
    scratch_.resize(task_.rows() * tokens);
    KVSHRINK_RETURN_IF_ERROR(
        AttentionScores(backend, shard, task_.params, q, scratch_.data(), basis));
    for (size_t row = 0; row < task_.rows(); ++row) {
      AddRow(std::span(scratch_).subspan(row * tokens, tokens),
             std::span(best_).subspan(row * task_.top_k, task_.top_k));
    }
    first_ += static_cast<uint32_t>(tokens);
    return absl::OkStatus();
  }

  std::string Take() override {
    std::string body;
    body.reserve(task_.answer_bytes());
    for (size_t row = 0; row < task_.rows(); ++row) {
      const auto best = std::span(best_).subspan(row * task_.top_k, task_.top_k);
      std::sort_heap(best.begin(), best.end(), Better);
      for (const Entry& entry : best) {
        Append(&entry.score, sizeof(entry.score), &body);
      }
    }
    for (const Entry& entry : best_) {
      Append(&entry.token, sizeof(entry.token), &body);
    }
    return body;
  }

 private:
  static constexpr uint32_t kUnused = std::numeric_limits<uint32_t>::max();

  struct Entry {
    float score = 0;
    uint32_t token = kUnused;

    // A block kept raw may make scores NaN: they rank below all others, and above a place that
    // holds no token yet.
    int rank() const { return token == kUnused ? 2 : std::isnan(score) ? 1 : 0; }
  };

  // A total order; equal scores by token.
  static bool Better(const Entry& a, const Entry& b) {
    if (a.rank() != b.rank()) {
      return a.rank() < b.rank();
    }
    if (a.rank() == 0 && a.score != b.score) {
      return a.score > b.score;
    }
    return a.token < b.token;
  }

  // Each row is a heap whose front is its worst entry.
  void AddRow(std::span<const float> scores, std::span<Entry> best) const {
    for (uint32_t i = 0; i < scores.size(); ++i) {
      const Entry entry{scores[i], first_ + i};
      if (Better(entry, best.front())) {
        std::pop_heap(best.begin(), best.end(), Better);
        best.back() = entry;
        std::push_heap(best.begin(), best.end(), Better);
      }
    }
  }

  const AttendTask task_;
  std::vector<Entry> best_;
  std::vector<float> scratch_;
  uint32_t first_ = 0;
};

class PartialOutput final : public AttendSink {
 public:
  explicit PartialOutput(const AttendTask& task)
      : task_(task), accumulator_(task.params, task.head_dim) {}

  absl::Status Add(const Backend& backend, const Shard& shard, const float* q,
                   const Basis* basis) override {
    return accumulator_.Add(backend, shard, q, basis);
  }

  std::string Take() override {
    std::string body;
    body.reserve(task_.answer_bytes());
    Append(accumulator_.output().data(), accumulator_.output().size_bytes(), &body);
    Append(accumulator_.lse().data(), accumulator_.lse().size_bytes(), &body);
    return body;
  }

 private:
  const AttendTask task_;
  AttentionAccumulator accumulator_;
};

}  // namespace

uint64_t AttendTask::answer_bytes() const {
  if (output) {
    return rows() * (uint64_t{head_dim} + 1) * sizeof(float);
  }
  return rows() * (top_k == 0 ? tokens * sizeof(float) : uint64_t{top_k} * 2 * sizeof(float));
}

uint64_t AttendTask::scratch_bytes() const {
  const uint64_t logits = rows() * max_shard_tokens * sizeof(float);
  return output ? answer_bytes() + logits : logits + (top_k == 0 ? 0 : answer_bytes());
}

std::unique_ptr<AttendSink> MakeAttendSink(const AttendTask& task) {
  if (task.output) {
    return std::make_unique<PartialOutput>(task);
  }
  if (task.top_k == 0) {
    return std::make_unique<AllScores>(task);
  }
  return std::make_unique<TopScores>(task);
}

}  // namespace kvshrink::service
