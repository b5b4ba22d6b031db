#include "kvshrink/client/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace kvshrink::client {

void ParallelFor(size_t count, int threads, const std::function<void(size_t)>& work) {
  const size_t wanted = threads > 0 ? static_cast<size_t>(threads)
                                    : std::max(1U, std::thread::hardware_concurrency());
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t item = next++; item < count; item = next++) {
      work(item);
    }
  };
  std::vector<std::jthread> others;
  for (size_t i = 1; i < std::min(wanted, count); ++i) {
    others.emplace_back(run);
  }
  run();
}

}  // namespace kvshrink::client
