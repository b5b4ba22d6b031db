#include "cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace kvshrink::cpu {
namespace {

TEST(ThreadPool, EveryItemOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const size_t count : {size_t{0}, size_t{1}, size_t{2}, size_t{1000}}) {
      std::vector<std::atomic<int>> hits(count);
      pool.ForEach(count, [&](size_t i) { hits[i].fetch_add(1); });
      for (const std::atomic<int>& hit : hits) {
        EXPECT_EQ(hit.load(), 1);
      }
    }
  }
}

TEST(ThreadPool, SeveralCallersAtOnce) {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  std::atomic<int> sum{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        pool.ForEach(7, [&](size_t) { sum.fetch_add(1); });
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  EXPECT_EQ(sum.load(), 4 * 200 * 7);
}

}  // namespace
}  // namespace kvshrink::cpu
