// The streaming RPCs that are open: who must hear of a drain, and who holds memory without moving.
#pragma once

#include <cstddef>
#include <memory>
#include <unordered_map>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace kvshrink::service {

class OpenStream {
 public:
  virtual ~OpenStream() = default;
  // The daemon drains: the stream ends as soon as what it was admitted for is answered.
  virtual void OnDrain() = 0;
  // Ends the stream if its client has neither sent nor read for `timeout` although it is its turn.
  virtual void CutOffIfStalled(absl::Time now, absl::Duration timeout) = 0;
};

// Thread-safe.
class StreamRegistry {
 public:
  void Add(const std::shared_ptr<OpenStream>& stream);
  void Remove(const OpenStream* stream);
  size_t size() const;

  void Drain();
  void CutOffStalled(absl::Time now, absl::Duration timeout);

 private:
  std::vector<std::shared_ptr<OpenStream>> All() const;

  mutable absl::Mutex mu_;
  std::unordered_map<const OpenStream*, std::weak_ptr<OpenStream>> streams_ ABSL_GUARDED_BY(mu_);
};

}  // namespace kvshrink::service
