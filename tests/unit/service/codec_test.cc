// The parts of the GPU's codec that need no GPU: memory by the piece, what is asked of the device,
// what of its answers is believed, and what a daemon does where there is none.
#include <stdlib.h>

#include <atomic>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/engine/arena.h"
#include "service/engine/coding.h"
#include "service/engine/cuda_codec.h"
#include "service/engine/cuda_requests.h"
#include "tests/unit/service/daemon_fixture.h"

namespace kvshrink::service::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Arena, GivesPlacesThatDontOverlapAndTakesThemBack) {
  Arena arena(1024);
  auto first = arena.Take(1);
  auto second = arena.Take(256);
  auto third = arena.Take(257);
  ASSERT_TRUE(first.has_value() && second.has_value() && third.has_value());
  EXPECT_EQ(first->offset(), 0U);
  EXPECT_EQ(second->offset(), 256U);
  EXPECT_EQ(third->offset(), 512U);
  second.reset();
  EXPECT_EQ(arena.Take(200)->offset(), 256U);  // the hole
  first.reset();
  EXPECT_EQ(arena.Take(512)->offset(), 0U);  // two holes that have become one
}

TEST(Arena, RefusesWhatCanNeverFit) {
  Arena arena(1000);  // room for three times 256
  EXPECT_FALSE(arena.Take(1001).has_value());
  EXPECT_FALSE(arena.Take(769).has_value());
  EXPECT_FALSE(arena.Take(UINT64_MAX).has_value());
  EXPECT_TRUE(arena.Take(768).has_value());
}

TEST(Arena, ServesInOrder) {
  Arena arena(1024);
  auto half = arena.Take(512);
  std::atomic<int> served = 0;
  std::thread large([&] {
    const auto piece = arena.Take(1024);
    EXPECT_EQ(served++, 0);
  });
  // The small one would fit at once; it comes after the large one all the same.
  std::thread small;
  const bool waits = Eventually([&] { return arena.waiting() == 1; });
  small = std::thread([&] {
    const auto piece = arena.Take(256);
    EXPECT_EQ(served++, 1);
  });
  EXPECT_TRUE(waits && Eventually([&] { return arena.waiting() == 2; }));
  EXPECT_EQ(served, 0);
  half.reset();
  large.join();
  small.join();
  EXPECT_EQ(served, 2);
}

TEST(Arena, ManyThreadsNeverShareAPlace) {
  constexpr int kThreads = 8;
  std::vector<std::atomic<int>> owner(64);
  Arena arena(owner.size() * Arena::kAlignment);
  std::vector<std::thread> threads;
  for (int t = 1; t <= kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 500; ++i) {
        const size_t count = 1 + (i * 7 + static_cast<size_t>(t)) % 20;
        const auto piece = arena.Take(count * Arena::kAlignment);
        ASSERT_TRUE(piece.has_value());
        const size_t first = piece->offset() / Arena::kAlignment;
        for (size_t at = first; at < first + count; ++at) {
          EXPECT_EQ(owner[at].exchange(t), 0);
        }
        for (size_t at = first; at < first + count; ++at) {
          EXPECT_EQ(owner[at].exchange(0), t);
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

TEST(Requests, HeadsInRuns) {
  const std::vector<uint32_t> some = {0, 2, 3, 4, 7};
  EXPECT_THAT(RunsOf(8, {}), ElementsAre(HeadRun{0, 8, 0}));
  EXPECT_THAT(RunsOf(8, some), ElementsAre(HeadRun{0, 1, 0}, HeadRun{2, 5, 1}, HeadRun{7, 8, 4}));
}

TensorPlan PlanOf(TensorShape shape, DType dtype, uint64_t v_offset_bytes = 0) {
  return MakeTensorPlan(dtype, shape, LayoutThd(shape), false, v_offset_bytes, "tensor").value();
}

TEST(Requests, RunsGoToTheirPlaces) {
  const TensorPlan plan = PlanOf({5, 3, 64}, DType::kBf16);
  std::vector<std::byte> output(plan.bytes);
  // Head 6 of the shard is the output's head 1.
  const cuda::CudaTarget target = TargetOf({6, 7, 1}, plan, output.data());
  const uint64_t head_bytes = uint64_t{64} * 2;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(target.k) + 6 * head_bytes,
            reinterpret_cast<uintptr_t>(output.data()) + head_bytes);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(target.v) - reinterpret_cast<uintptr_t>(target.k),
            plan.v_offset_bytes);
}

TEST(Requests, RowsMustLieWhereTheDeviceCanReadThem) {
  cuda::CudaEncodeApi api;
  api.supported = [](const cuda::EncodeBatch& batch) { return batch.head_dim == 64; };
  const TensorShape shape = {4, 2, 64};
  EXPECT_TRUE(DeviceEncodes(api, PlanOf(shape, DType::kBf16), {}));
  EXPECT_FALSE(DeviceEncodes(api, PlanOf({4, 2, 32}, DType::kBf16), {}));
  EXPECT_FALSE(DeviceEncodes(api, PlanOf(shape, DType::kBf16, 1026), {}));
  TensorLayout odd = LayoutThd(shape);
  odd.token_stride += 4;
  EXPECT_FALSE(DeviceEncodes(
      api, MakeTensorPlan(DType::kBf16, shape, odd, false, 4096, "tensor").value(), {}));
  EXPECT_TRUE(DeviceEncodes(
      api, MakeTensorPlan(DType::kFp32, shape, odd, false, 4096, "tensor").value(), {}));
  EncodeOptions options;
  options.bits_per_entry = 2;
  EXPECT_FALSE(DeviceEncodes(api, PlanOf(shape, DType::kBf16), options));
  options = {};
  options.rope.emplace();
  EXPECT_FALSE(DeviceEncodes(api, PlanOf(shape, DType::kBf16), options));
}

TEST(Requests, WhatTheDeviceLeavesToTheCpuWhenDecoding) {
  const TensorPlan plan = PlanOf({4, 2, 64}, DType::kBf16);
  ShardHeader header;
  header.shape = plan.shape;
  const std::vector<uint32_t> missing = {0, 2};
  EXPECT_TRUE(DeviceDecodes(header, plan, {}));
  EXPECT_FALSE(DeviceDecodes(header, plan, missing));
  EXPECT_FALSE(DeviceDecodes(header, PlanOf(plan.shape, DType::kFp8E4m3), {}));
  header.profile = Profile::kKvs2t;
  EXPECT_FALSE(DeviceDecodes(header, plan, {}));
  header.profile = Profile::kKvs2;
  header.keys_only = true;
  EXPECT_FALSE(DeviceDecodes(header, plan, {}));
  header.keys_only = false;
  header.extensions.rope.emplace();
  EXPECT_FALSE(DeviceDecodes(header, plan, {}));
}

TEST(Requests, OnlyTheShardThatWasAskedForIsTaken) {
  const TensorPlan plan = PlanOf(kShape, DType::kFp32);
  EncodeOptions options;
  options.layer = 3;
  const std::string shard = Encode(kShape, MakeBody(kShape, 1), options);
  EXPECT_TRUE(CheckMade(shard, plan, options).ok());
  std::string damaged = shard;
  damaged.back() = static_cast<char>(damaged.back() ^ 1);
  EXPECT_THAT(CheckMade(damaged, plan, options).message(), HasSubstr("is bad"));
  EncodeOptions other = options;
  other.layer = 4;
  EXPECT_FALSE(CheckMade(shard, plan, other).ok());
  other = options;
  other.raw_tokens = 2;
  EXPECT_FALSE(CheckMade(shard, plan, other).ok());
  EXPECT_FALSE(CheckMade(shard, PlanOf({32, 4, 32}, DType::kFp32), options).ok());
}

TEST(Requests, ReportIsCompleted) {
  const TensorPlan plan = PlanOf(kShape, DType::kBf16);
  cuda::EncodeReport made;
  made.bytes = 1000;
  made.kind[0].bytes = 600;
  made.kind[1].bytes = 400;
  made.kind[1].rank_histogram[5] = 7;
  const ShardReport report = DeviceReport(plan, made);
  EXPECT_EQ(report.raw_bytes, 2 * kShape.entries() * 2);
  EXPECT_EQ(report.entries(), 2 * kShape.entries());
  EXPECT_EQ(report.encoded_bytes, 1000U);
  EXPECT_EQ(report.k.bytes, 600U);
  EXPECT_EQ(report.v.rank_histogram[5], 7U);
}

// A module that can't be loaded, whatever this machine has.
class NoModule : public ::testing::Test {
 protected:
  void SetUp() override { setenv("KVSHRINK_CUDA_MODULE", "/nowhere/libkvshrink_cuda.so", 1); }
  void TearDown() override { unsetenv("KVSHRINK_CUDA_MODULE"); }

  const std::unique_ptr<Backend> cpu_ = MakeCpuBackend(1);
};

TEST_F(NoModule, CudaRefusesAndSaysWhatToDo) {
  Options options = TestOptions();
  options.backend = "cuda";
  const auto server = Server::Start(options);
  EXPECT_EQ(server.status().code(), absl::StatusCode::kFailedPrecondition);
  const std::string message(server.status().message());
  EXPECT_THAT(message, HasSubstr("backend cuda: "));
  EXPECT_THAT(message, HasSubstr("/nowhere/libkvshrink_cuda.so"));
  EXPECT_THAT(message, HasSubstr("put libkvshrink_cuda.so beside kvshrinkd or name it in "
                                 "KVSHRINK_CUDA_MODULE, or use --backend cpu"));
  EXPECT_EQ(message.find('\n'), std::string::npos);
}

TEST_F(NoModule, AnotherLibraryIsNotTakenForIt) {
  setenv("KVSHRINK_CUDA_MODULE", "libm.so.6", 1);
  const auto codec = ChooseCodec("cuda", {}, *cpu_);
  EXPECT_EQ(codec.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(codec.status().message()), HasSubstr("of one build"));
}

TEST_F(NoModule, AutoRunsOnTheCpu) {
  Options options = TestOptions();
  options.backend = "auto";
  Daemon daemon(options);
  EXPECT_EQ(daemon.Info().backend(), "cpu");
  EXPECT_FALSE(daemon.Info().device().empty());
  PutChunk(daemon, "a", 2, 1);
  EXPECT_FALSE(daemon.server().codec().health().has_device);
}

}  // namespace
}  // namespace kvshrink::service::testing
