// Executor: the fixed pool of threads that runs the codec and waits for the disk, so that gRPC's
// threads never do.
#pragma once

#include <cstddef>
#include <deque>
#include <thread>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

namespace kvshrink::service {

class Executor {
 public:
  using Job = absl::AnyInvocable<void()>;

  // threads >= 1. Jobs beyond `capacity` waiting ones are refused.
  Executor(int threads, size_t capacity);
  // Runs what was accepted, then joins.
  ~Executor();

  // False when the queue is full; the job is then dropped without being run. Thread-safe. Jobs run
  // in the order of submission.
  [[nodiscard]] bool Submit(Job job);

  size_t queued() const;
  int threads() const { return static_cast<int>(threads_.size()); }

 private:
  void Run();

  const size_t capacity_;
  mutable absl::Mutex mu_;
  std::deque<Job> queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvshrink::service
