// Encode, decode and attend on a real layer (SmolLM2, layer 12, 512 tokens x 3 heads x 64). Bytes
// are raw bytes in fp32, as given.
#include <benchmark/benchmark.h>

#include "blocks.h"
#include "kvshrink/attention.h"

namespace kvshrink {
namespace {

struct Layer {
  testing::Tensor k = testing::SmolLayer("k", 12);
  testing::Tensor v = testing::SmolLayer("v", 12);
  // A trace's dtype is two bytes: that is what throughput counts.
  int64_t raw_bytes() const { return static_cast<int64_t>(2 * 2 * k.values.size()); }
};

const Layer& TheLayer() {
  static const Layer layer;
  return layer;
}

Profile ProfileOf(const benchmark::State& state) { return static_cast<Profile>(state.range(0)); }

EncodeOptions OptionsOf(const benchmark::State& state) {
  EncodeOptions options = testing::OptionsOf(ProfileOf(state));
  if (state.range(2) != 0) {
    options.rope = Rope{.theta = 1e5};
  }
  return options;
}

void Finish(benchmark::State& state) {
  state.SetBytesProcessed(static_cast<int64_t>(state.iterations()) * TheLayer().raw_bytes());
  state.SetLabel(std::string(GetProfileInfo(ProfileOf(state)).name));
}

void Encode(benchmark::State& state) {
  const auto backend = MakeCpuBackend(static_cast<int>(state.range(1)));
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        EncodeShard(*backend, TheLayer().k.View(), TheLayer().v.View(), OptionsOf(state)));
  }
  Finish(state);
}

void Decode(benchmark::State& state) {
  const auto backend = MakeCpuBackend(static_cast<int>(state.range(1)));
  const auto bytes =
      *EncodeShard(*backend, TheLayer().k.View(), TheLayer().v.View(), OptionsOf(state));
  const auto shard = *Shard::Parse(bytes);
  testing::Tensor k = testing::Zeros(shard.header().shape);
  testing::Tensor v = k;
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        DecodeShard(*backend, shard, DecodeForm::kFull, k.MutableView(), v.MutableView()));
  }
  Finish(state);
}

void Attend(benchmark::State& state) {
  const auto backend = MakeCpuBackend(static_cast<int>(state.range(1)));
  const auto bytes =
      *EncodeShard(*backend, TheLayer().k.View(), TheLayer().v.View(), OptionsOf(state));
  const auto shard = *Shard::Parse(bytes);
  const AttentionParams params{1, 9, 0, 0, -1, 0};
  const std::vector<float> q = testing::Gaussian({1, 9, 64}, 1).values;
  for (auto _ : state) {
    AttentionAccumulator accumulator(params, 64);
    benchmark::DoNotOptimize(accumulator.Add(*backend, shard, q.data()));
  }
  Finish(state);
}

void Arguments(benchmark::internal::Benchmark* bench) {
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    for (const int threads : {1, 2}) {
      for (const int rope : {0, 1}) {
        bench->Args({static_cast<int64_t>(profile.profile), threads, rope});
      }
    }
  }
  bench->ArgNames({"profile", "threads", "rope"})->UseRealTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK(Encode)->Apply(Arguments);
BENCHMARK(Decode)->Apply(Arguments);
BENCHMARK(Attend)->Apply(Arguments);

}  // namespace
}  // namespace kvshrink

BENCHMARK_MAIN();
