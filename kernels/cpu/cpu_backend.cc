// What runs on CPUs: see codec.h.
#include <algorithm>
#include <thread>

#include "block_pipeline.h"
#include "cpu/cpu_decoder.h"
#include "cpu/cpu_encoder.h"
#include "cpu/thread_pool.h"
#include "kvshrink/codec.h"

namespace kvshrink {
namespace {

int ThreadCount(int asked) {
  if (asked > 0) {
    return asked;
  }
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads) : pool_(ThreadCount(threads)) {}

  std::string_view name() const override { return "cpu"; }

  void ForEach(size_t count, absl::FunctionRef<void(size_t)> body) const override {
    pool_.ForEach(count, body);
  }

  void AnalyseBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                     std::span<BlockSpectrum> out) const override {
    pool_.ForEach(in.size(), [&](size_t i) {
      static thread_local cpu::CpuStages stages;
      AnalyseBlock(settings, in[i], &stages, &out[i]);
    });
  }

  void EncodeBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                    std::span<BlockOutput> out) const override {
    pool_.ForEach(in.size(), [&](size_t i) {
      static thread_local cpu::CpuStages stages;
      EncodeBlock(settings, in[i], &stages, &out[i]);
    });
  }

  absl::Status UnpackBlock(Family family, const BlockView& block, uint32_t head_dim,
                           DecodeForm form, UnpackedBlock* out) const override {
    return Decoder().Unpack(family, block, head_dim, form, out);
  }

  absl::Status DecodeBlock(Family family, const BlockView& block, uint32_t head_dim,
                           DecodeForm form, float* rows) const override {
    return Decoder().Decode(family, block, head_dim, form, rows);
  }

 private:
  static cpu::CpuDecoder& Decoder() {
    static thread_local cpu::CpuDecoder decoder;
    return decoder;
  }

  mutable cpu::ThreadPool pool_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(int threads) {
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace kvshrink
