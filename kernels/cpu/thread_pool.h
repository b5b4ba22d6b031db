// Threads that share the items of loops. Several callers may run loops at the same time; each works
// on its own loop too, so that a loop always goes on, even when all threads are busy with others.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace kvshrink::cpu {

class ThreadPool {
 public:
  // threads: those that work on one loop, the caller's included; at least 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Runs body(i) for i < count; returns when all are done. Not from inside a body.
  void ForEach(size_t count, absl::FunctionRef<void(size_t)> body);

 private:
  struct Loop;

  void Work();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Loop>> loops_;  // with items that nobody has taken
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace kvshrink::cpu
