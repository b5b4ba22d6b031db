// Attention on the GPU against the CPU's, on the same shards.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "device.h"
#include "kvshrink/attention.h"

namespace kvshrink {
namespace {

using testing::Buffer;
using testing::DeviceBatch;
using testing::Tensor;

class GpuAttend : public testing::GpuTest {};

// Sequences of chunks of one layer.
struct Setting {
  std::string name;
  TensorShape shape;                // of the largest chunk
  std::vector<std::string> shards;  // all chunks
  std::vector<std::vector<uint32_t>> sequences;
  AttentionParams params;
};

std::string Coded(Profile profile, TensorShape shape, uint32_t first_token, uint32_t seed) {
  const auto backend = MakeCpuBackend();
  EncodeOptions options = testing::OptionsOf(profile);
  options.first_token = first_token;
  options.raw_tokens = 2;
  return *EncodeShard(*backend, testing::LowRankPlusNoise(shape, 5, 0.3F, seed).View(),
                      testing::LowRankPlusNoise(shape, 3, 0.5F, seed + 1).View(), options);
}

AttentionParams Params(uint32_t queries, uint32_t q_heads) {
  AttentionParams params;
  params.queries = queries;
  params.q_heads = q_heads;
  return params;
}

std::vector<Setting> Settings() {
  std::vector<Setting> settings;
  for (const Profile profile :
       {Profile::kKvs2, Profile::kKvs3, Profile::kKvs4, Profile::kTq2, Profile::kTq3,
        Profile::kEOptShrinkQ2, Profile::kFp8, Profile::kRaw}) {
    for (const uint32_t d : {64U, 128U, 256U, 80U}) {
      Setting setting{std::string(GetProfileInfo(profile).name) + " of " + std::to_string(d),
                      {300, 2, d},
                      {},
                      {{0, 1}, {2}},
                      Params(1, 8)};
      setting.shards = {Coded(profile, {300, 2, d}, 0, d), Coded(profile, {140, 2, d}, 300, d + 7),
                        Coded(profile, {256, 2, d}, 0, d + 9)};
      settings.push_back(setting);
    }
  }
  Setting many = settings[1];
  many.name = "three queries, causal, window, soft cap";
  many.params = Params(3, 6);
  many.params.softcap = 20;
  many.params.first_query = 400;
  many.params.window = 200;
  settings.push_back(many);
  Setting wide = settings[1];
  wide.name = "16 heads of a group";
  wide.params = Params(1, 32);
  settings.push_back(wide);
  return settings;
}

class SettingRun {
 public:
  SettingRun(const cuda::CudaApi& api, const Setting& setting)
      : setting_(setting), batch_(api, setting.shards, setting.shape), max_chunks_(3) {
    std::vector<uint32_t> chunks(setting.sequences.size() * max_chunks_, 0xFFFFFFFFU);
    std::vector<uint32_t> counts;
    for (size_t s = 0; s < setting.sequences.size(); ++s) {
      std::copy(setting.sequences[s].begin(), setting.sequences[s].end(),
                chunks.begin() + static_cast<std::ptrdiff_t>(s * max_chunks_));
      counts.push_back(static_cast<uint32_t>(setting.sequences[s].size()));
    }
    chunks_.emplace_back(chunks);
    counts_.emplace_back(counts);
    first_query_.emplace_back(
        std::vector<int32_t>(counts.size(), static_cast<int32_t>(setting.params.first_query)));
    const TensorShape q_shape{static_cast<uint32_t>(counts.size()) * setting.params.queries,
                              setting.params.q_heads, setting.shape.head_dim};
    q_host_ = testing::Gaussian(q_shape, 99).values;
    q_.emplace_back(q_host_);
    EXPECT_EQ(batch_.Parse(), 0);
  }

  cuda::AttendParams Params() const {
    cuda::AttendParams params;
    params.batch = batch_.batch();
    params.view = batch_.view();
    params.sequences = static_cast<uint32_t>(setting_.sequences.size());
    params.max_chunks = max_chunks_;
    params.chunks = chunks_[0].get();
    params.chunk_counts = counts_[0].get();
    params.queries = setting_.params.queries;
    params.q_heads = setting_.params.q_heads;
    params.q = q_[0].get();
    params.scale = setting_.params.scale;
    params.softcap = setting_.params.softcap;
    params.window = setting_.params.window;
    params.first_query = first_query_[0].get();
    params.status = batch_.status();
    return params;
  }
  std::vector<uint64_t> Status() const { return batch_.Status(); }
  size_t q_stride() const {
    return size_t{setting_.params.queries} * setting_.params.q_heads * setting_.shape.head_dim;
  }
  const float* Q(size_t sequence) const { return q_host_.data() + sequence * q_stride(); }

 private:
  const Setting& setting_;
  DeviceBatch batch_;
  uint32_t max_chunks_;
  std::vector<Buffer<uint32_t>> chunks_, counts_;
  std::vector<Buffer<int32_t>> first_query_;
  std::vector<Buffer<float>> q_;
  std::vector<float> q_host_;
};

double RelativeError(const std::vector<float>& got, const std::vector<float>& want) {
  return std::sqrt(testing::ErrorEnergy(got, want) / std::max(testing::Energy(want), 1e-30));
}

TEST_F(GpuAttend, OutputAndLogSumExp) {
  const auto backend = MakeCpuBackend();
  for (const Setting& setting : Settings()) {
    const SettingRun run(*api_, setting);
    cuda::AttendParams params = run.Params();
    const size_t rows = setting.sequences.size() * setting.params.queries * setting.params.q_heads;
    Buffer<float> output(rows * setting.shape.head_dim);
    Buffer<float> lse(rows);
    Buffer<uint8_t> workspace(api_->attend_workspace_bytes(params));
    params.output = output.get();
    params.lse = lse.get();
    params.workspace = workspace.get();
    params.workspace_bytes = api_->attend_workspace_bytes(params);
    ExpectOk(api_->attend(params, nullptr));
    std::vector<float> want_output;
    std::vector<float> want_lse;
    for (size_t s = 0; s < setting.sequences.size(); ++s) {
      AttentionAccumulator want(setting.params, setting.shape.head_dim);
      for (const uint32_t chunk : setting.sequences[s]) {
        const auto shard = *Shard::Parse(setting.shards[chunk]);
        ASSERT_TRUE(want.Add(*backend, shard, run.Q(s)).ok());
      }
      want_output.insert(want_output.end(), want.output().begin(), want.output().end());
      want_lse.insert(want_lse.end(), want.lse().begin(), want.lse().end());
    }
    EXPECT_LT(RelativeError(output.Get(), want_output), 1e-4) << setting.name;
    const std::vector<float> got_lse = lse.Get();
    for (size_t i = 0; i < rows; ++i) {
      ASSERT_NEAR(got_lse[i], want_lse[i], 1e-3) << setting.name << ", row " << i;
    }
    for (const uint64_t status : run.Status()) {
      EXPECT_EQ(status, 0U) << setting.name;
    }
  }
}

TEST_F(GpuAttend, ScoresAndTopK) {
  const auto backend = MakeCpuBackend();
  for (const Setting& setting : Settings()) {
    const SettingRun run(*api_, setting);
    constexpr uint32_t kStride = 450;
    constexpr uint32_t kTop = 37;
    const size_t rows_of_one = size_t{setting.params.queries} * setting.params.q_heads;
    const size_t rows = setting.sequences.size() * rows_of_one;
    Buffer<float> logits(rows * kStride);
    ExpectOk(api_->scores({run.Params(), logits.get(), kStride}, nullptr));
    std::vector<float> want(rows * kStride, -std::numeric_limits<float>::infinity());
    for (size_t s = 0; s < setting.sequences.size(); ++s) {
      uint32_t base = 0;
      for (const uint32_t chunk : setting.sequences[s]) {
        const auto shard = *Shard::Parse(setting.shards[chunk]);
        const uint32_t tokens = shard.header().shape.tokens;
        std::vector<float> part(rows_of_one * tokens);
        ASSERT_TRUE(AttentionScores(*backend, shard, setting.params, run.Q(s), part.data()).ok());
        for (size_t r = 0; r < rows_of_one; ++r) {
          std::copy_n(
              part.begin() + static_cast<std::ptrdiff_t>(r * tokens), tokens,
              want.begin() + static_cast<std::ptrdiff_t>((s * rows_of_one + r) * kStride + base));
        }
        base += tokens;
      }
    }
    const std::vector<float> got = logits.Get();
    size_t wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      wrong += got[i] == want[i] || std::fabs(got[i] - want[i]) < 2e-3F ? 0 : 1;
    }
    EXPECT_EQ(wrong, 0U) << setting.name;

    Buffer<float> values(rows * kTop);
    Buffer<uint32_t> places(rows * kTop);
    ExpectOk(api_->top_k(
        {logits.get(), static_cast<uint32_t>(rows), kStride, kTop, values.get(), places.get()},
        nullptr));
    const std::vector<uint32_t> got_places = places.Get();
    for (size_t r = 0; r < rows; ++r) {
      std::vector<uint32_t> order(kStride);
      std::iota(order.begin(), order.end(), 0U);
      const float* row = got.data() + r * kStride;
      std::stable_sort(order.begin(), order.end(),
                       [row](uint32_t a, uint32_t b) { return row[a] > row[b]; });
      for (uint32_t i = 0; i < kTop; ++i) {
        const uint32_t place = std::isinf(row[order[i]]) ? 0xFFFFFFFFU : order[i];
        ASSERT_EQ(got_places[r * kTop + i], place) << setting.name << ", row " << r << ", " << i;
      }
    }
  }
}

TEST_F(GpuAttend, SmallSameBytesEveryTimeAndInAGraph) {
  const Setting setting = Settings()[1];
  const SettingRun run(*api_, setting);
  cuda::AttendParams params = run.Params();
  const size_t rows = setting.sequences.size() * setting.params.q_heads;
  Buffer<float> output(rows * setting.shape.head_dim);
  Buffer<float> lse(rows);
  Buffer<uint8_t> workspace(api_->attend_workspace_bytes(params));
  params.output = output.get();
  params.lse = lse.get();
  params.workspace = workspace.get();
  params.workspace_bytes = api_->attend_workspace_bytes(params);
  ExpectOk(api_->attend(params, nullptr));
  const std::vector<float> first = output.Get();
  testing::Check(cudaMemset(output.get(), 0xA5, output.bytes()));
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  testing::Check(cudaStreamCreate(&stream));
  testing::Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  ExpectOk(api_->attend(params, stream));
  testing::Check(cudaStreamEndCapture(stream, &graph));
  testing::Check(cudaGraphInstantiate(&executable, graph, 0));
  testing::Check(cudaGraphLaunch(executable, stream));
  testing::Check(cudaStreamSynchronize(stream));
  EXPECT_EQ(output.Get(), first);
  testing::Check(cudaGraphExecDestroy(executable));
  testing::Check(cudaGraphDestroy(graph));
  testing::Check(cudaStreamDestroy(stream));

  params.workspace_bytes -= 1;
  EXPECT_EQ(api_->attend(params, nullptr), cuda::kBadArgument);
}

}  // namespace
}  // namespace kvshrink
