#include "cpu/thread_pool.h"

#include <algorithm>
#include <atomic>

namespace kvshrink::cpu {

struct ThreadPool::Loop {
  Loop(size_t item_count, absl::FunctionRef<void(size_t)> loop_body)
      : count(item_count), body(loop_body) {}

  // Takes items until none is left.
  void Run() {
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      body(i);
      if (done.fetch_add(1) + 1 == count) {
        const std::lock_guard lock(mutex);
        finished = true;
        all_done.notify_all();
      }
    }
  }

  const size_t count;
  const absl::FunctionRef<void(size_t)> body;
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};
  std::mutex mutex;
  std::condition_variable all_done;
  bool finished = false;
};

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) {
    workers_.emplace_back([this] { Work(); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) {
    worker.join();
  }
}

void ThreadPool::ForEach(size_t count, absl::FunctionRef<void(size_t)> body) {
  if (count <= 1 || workers_.empty()) {
    for (size_t i = 0; i < count; ++i) {
      body(i);
    }
    return;
  }
  const auto loop = std::make_shared<Loop>(count, body);
  {
    const std::lock_guard lock(mutex_);
    loops_.push_back(loop);
  }
  wake_.notify_all();
  loop->Run();
  {
    const std::lock_guard lock(mutex_);
    loops_.erase(std::remove(loops_.begin(), loops_.end(), loop), loops_.end());
  }
  std::unique_lock lock(loop->mutex);
  loop->all_done.wait(lock, [&] { return loop->finished; });
}

void ThreadPool::Work() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || !loops_.empty(); });
    if (stopping_) {
      return;
    }
    const std::shared_ptr<Loop> loop = loops_.front();
    lock.unlock();
    loop->Run();
    lock.lock();
    // All its items are taken.
    loops_.erase(std::remove(loops_.begin(), loops_.end(), loop), loops_.end());
  }
}

}  // namespace kvshrink::cpu
