// The parts below the RPCs: frame sequences, admission, executor, tensor plans.
#include <atomic>
#include <limits>
#include <string>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/engine/admission.h"
#include "service/engine/attend.h"
#include "service/engine/coding.h"
#include "service/engine/executor.h"
#include "service/engine/tensor_plan.h"
#include "service/rpc/frame_assembler.h"
#include "service/rpc/limits.h"

namespace kvshrink::service {
namespace {

using ::testing::HasSubstr;

std::string MessageOf(const absl::Status& status) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  return std::string(status.message());
}

TEST(FrameAssembler, CollectsBodiesOneAfterTheOther) {
  FrameAssembler assembler;
  ASSERT_TRUE(assembler.Begin(1, 5).ok());
  assembler.Accept();
  EXPECT_TRUE(assembler.inside());
  EXPECT_FALSE(assembler.Add("abc").value());
  EXPECT_TRUE(assembler.Add("de").value());
  EXPECT_EQ(assembler.TakeBody(), "abcde");
  EXPECT_FALSE(assembler.inside());
  ASSERT_TRUE(assembler.Begin(2, 1).ok());
  assembler.Accept();
  EXPECT_TRUE(assembler.Add("x").value());
  EXPECT_EQ(assembler.TakeBody(), "x");
  EXPECT_TRUE(assembler.End().ok());
}

TEST(FrameAssembler, RefusesIllegalFrames) {
  FrameAssembler assembler;
  EXPECT_THAT(MessageOf(assembler.Add("a").status()), HasSubstr("no header"));
  ASSERT_TRUE(assembler.Begin(1, 3 << 20).ok());
  assembler.Accept();
  EXPECT_THAT(MessageOf(assembler.Add("").status()), HasSubstr("'frame' is 0 bytes"));
  EXPECT_THAT(MessageOf(assembler.Add(std::string(kMaxFrameBytes + 1, 'a')).status()),
              HasSubstr("'frame' is 1048577 bytes"));
}

TEST(FrameAssembler, RefusesBytesBeyondTheBody) {
  FrameAssembler assembler;
  ASSERT_TRUE(assembler.Begin(1, 3).ok());
  assembler.Accept();
  EXPECT_THAT(MessageOf(assembler.Add("abcd").status()), HasSubstr("beyond body_bytes 3"));
  FrameAssembler complete;
  ASSERT_TRUE(complete.Begin(1, 3).ok());
  complete.Accept();
  EXPECT_TRUE(complete.Add("abc").value());
  EXPECT_THAT(MessageOf(complete.Add("d").status()), HasSubstr("no header"));
}

TEST(FrameAssembler, RefusesHeaderAndEndInsideABody) {
  FrameAssembler assembler;
  ASSERT_TRUE(assembler.Begin(1, 3).ok());
  assembler.Accept();
  EXPECT_FALSE(assembler.Add("ab").value());
  EXPECT_THAT(MessageOf(assembler.Begin(2, 3)), HasSubstr("2 of 3 bytes"));
  EXPECT_THAT(MessageOf(assembler.End()), HasSubstr("inside the body of object 1"));
}

TEST(FrameAssembler, RefusesAnIdInUse) {
  FrameAssembler assembler;
  ASSERT_TRUE(assembler.Begin(7, 1).ok());
  assembler.Accept();
  EXPECT_TRUE(assembler.Add("a").value());
  EXPECT_THAT(MessageOf(assembler.Begin(7, 1)), HasSubstr("'object_id' is 7"));
  assembler.Answered(7);
  EXPECT_TRUE(assembler.Begin(7, 1).ok());
}

TEST(FrameAssembler, DropsFramesOfARefusedObject) {
  FrameAssembler assembler;
  ASSERT_TRUE(assembler.Begin(1, std::numeric_limits<uint64_t>::max()).ok());
  assembler.Refuse();
  EXPECT_FALSE(assembler.Add(std::string(kMaxFrameBytes, 'a')).value());
  EXPECT_TRUE(assembler.End().ok());
  EXPECT_TRUE(assembler.Begin(2, 2).ok());  // the rest of the body needn't be sent
  assembler.Refuse();
  EXPECT_THAT(MessageOf(assembler.Add("abc").status()), HasSubstr("beyond body_bytes 2"));
}

TEST(Admission, GivesBackWhatTicketsHeld) {
  Admission admission(100, 2);
  {
    absl::StatusOr<Ticket> first = admission.Admit(60);
    ASSERT_TRUE(first.ok());
    EXPECT_TRUE(absl::IsResourceExhausted(admission.Admit(41).status()));
    absl::StatusOr<Ticket> second = admission.Admit(40);
    ASSERT_TRUE(second.ok());
    EXPECT_TRUE(absl::IsResourceExhausted(admission.Admit(0).status()));  // no place left
    EXPECT_EQ(admission.inflight_bytes(), 100U);
    const Ticket moved = *std::move(second);
    EXPECT_EQ(admission.inflight_tickets(), 2U);
  }
  EXPECT_EQ(admission.inflight_bytes(), 0U);
  EXPECT_EQ(admission.inflight_tickets(), 0U);
  EXPECT_EQ(admission.refused(), 2U);
  EXPECT_TRUE(
      absl::IsResourceExhausted(admission.Admit(std::numeric_limits<uint64_t>::max()).status()));
}

TEST(Admission, GrowsOrStays) {
  Admission admission(100, 4);
  Ticket ticket = admission.Admit(10).value();
  EXPECT_TRUE(ticket.GrowTo(90).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(ticket.GrowTo(101)));
  EXPECT_EQ(admission.inflight_bytes(), 90U);
  EXPECT_TRUE(ticket.GrowTo(20).ok());
  EXPECT_EQ(admission.inflight_bytes(), 90U);
  ticket = Ticket();
  EXPECT_EQ(admission.inflight_bytes(), 0U);
}

TEST(Executor, RefusesBeyondItsCapacityAndRunsWhatItTook) {
  absl::Notification gate;
  absl::Notification started;
  std::atomic<int> ran = 0;
  {
    Executor executor(1, 2);
    ASSERT_TRUE(executor.Submit([&] {
      started.Notify();
      gate.WaitForNotification();
      ++ran;
    }));
    started.WaitForNotification();
    EXPECT_TRUE(executor.Submit([&] { ++ran; }));
    EXPECT_TRUE(executor.Submit([&] { ++ran; }));
    EXPECT_FALSE(executor.Submit([&] { ++ran; }));
    EXPECT_EQ(executor.queued(), 2U);
    gate.Notify();
  }
  EXPECT_EQ(ran, 3);
}

TEST(TensorPlan, CountsPackedAndPaddedBytes) {
  const TensorShape shape{4, 2, 8};
  const TensorPlan packed =
      MakeTensorPlan(DType::kFp16, shape, LayoutThd(shape), false, 0, "tensor").value();
  EXPECT_EQ(packed.bytes, 2U * 4 * 2 * 8 * 2);
  EXPECT_EQ(packed.max_bytes, packed.bytes);
  EXPECT_EQ(packed.v_offset_bytes, packed.bytes / 2);
  // Rows of 20 elements where 16 are used: the last row's padding may be there or not.
  const TensorPlan padded =
      MakeTensorPlan(DType::kFp16, shape, {0, 0, 20, 8}, false, 200, "tensor").value();
  EXPECT_EQ(padded.bytes, 200 + 2 * (3 * 20 + 16));
  EXPECT_EQ(padded.max_bytes, 200 + 2 * 4 * 20);
  // Three tokens in pages of two: the last page is half full.
  const TensorShape three{3, 2, 8};
  const TensorPlan paged =
      MakeTensorPlan(DType::kFp32, three, LayoutBnhd(three, 2), false, 0, "tensor").value();
  EXPECT_EQ(paged.max_bytes - paged.bytes, 16U * 4);
}

TEST(TensorPlan, TakesPagesThatHoldKeysAndValues) {
  // [B,2,N,H,D] with N = 2, H = 2, D = 8: pages of 64 elements, K in the first half, V in the
  // second.
  const TensorShape shape{4, 2, 8};
  const TensorPlan plan =
      MakeTensorPlan(DType::kFp16, shape, {2, 64, 16, 8}, false, 64, "tensor").value();
  EXPECT_EQ(plan.bytes, 2U * 64 * 2);
}

TEST(TensorPlan, RefusesWhatDoesNotFit) {
  const TensorShape shape{4, 2, 8};
  const auto message = [&shape](const TensorLayout& layout, uint64_t v_offset) {
    return MessageOf(MakeTensorPlan(DType::kFp16, shape, layout, false, v_offset, "t").status());
  };
  EXPECT_THAT(message({0, 0, 15, 8}, 0), HasSubstr("t.layout.token_stride' is 15"));
  EXPECT_THAT(message({0, 0, 16, 7}, 0), HasSubstr("t.layout.head_stride' is 7"));
  EXPECT_THAT(message({2, 31, 16, 8}, 0), HasSubstr("t.layout.page_stride' is 31"));
  EXPECT_THAT(message({0, 0, uint64_t{1} << 63, 8}, 0), HasSubstr("t.layout.token_stride"));
  EXPECT_THAT(message({0, 0, uint64_t{1} << 40, 8}, 0), HasSubstr("2^40"));
  EXPECT_THAT(message(LayoutThd(shape), 127), HasSubstr("t.v_offset_bytes' is 127"));
  EXPECT_THAT(message(LayoutThd(shape), 129), HasSubstr("multiple of 2"));
  // In pages that hold K and V, V must lie beside K in its page.
  const TensorLayout pages{2, 64, 16, 8};
  EXPECT_THAT(message(pages, 62), HasSubstr("t.v_offset_bytes' is 62"));
  EXPECT_THAT(message(pages, 66), HasSubstr("t.v_offset_bytes' is 66"));
  EXPECT_THAT(message(LayoutThd(shape), std::numeric_limits<uint64_t>::max() - 1),
              HasSubstr("t.v_offset_bytes"));
}

TEST(AttendTask, SizesDoNotWrap) {
  AttendTask task;
  task.params.queries = kMaxQueries;
  task.params.q_heads = kMaxQHeads;
  task.head_dim = kMaxHeadDim;
  task.tokens = uint64_t{kMaxTokens} * kMaxChunksPerRequest;
  task.max_shard_tokens = kMaxTokens;
  EXPECT_EQ(task.answer_bytes(), uint64_t{1} << (12 + 10 + 16 + 12 + 2));
  EXPECT_EQ(task.scratch_bytes(), uint64_t{1} << (12 + 10 + 16 + 2));
}

}  // namespace
}  // namespace kvshrink::service
