// Which codec the daemon runs.
#include "kvshrink/cuda.h"
#include "kvshrink/strcat.h"
#include "service/engine/cuda_codec.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {
namespace {

std::string_view Remedy(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kNotFound:
      return "put libkvshrink_cuda.so beside kvshrinkd or name it in KVSHRINK_CUDA_MODULE";
    case absl::StatusCode::kFailedPrecondition:
      return "install kvshrinkd and libkvshrink_cuda.so of one build";
    case absl::StatusCode::kResourceExhausted:
      return "lower --device-bytes or free memory of the device";
    default:
      return "check NVIDIA's driver and device with nvidia-smi";
  }
}

absl::StatusOr<std::unique_ptr<Codec>> TryCuda(const CudaCodecOptions& options,
                                               const Backend& cpu) {
  absl::StatusOr<const cuda::CudaApi*> api = cuda::LoadModule();
  if (!api.ok()) {
    return api.status();
  }
  return MakeCudaCodec(**api, options, cpu);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Codec>> ChooseCodec(std::string_view backend,
                                                   const CudaCodecOptions& options,
                                                   const Backend& cpu) {
  if (backend == "cpu") {
    return MakeCpuCodec(cpu);
  }
  absl::StatusOr<std::unique_ptr<Codec>> codec = TryCuda(options, cpu);
  if (codec.ok()) {
    return codec;
  }
  const std::string why = StrCat(codec.status().message(), ": ", Remedy(codec.status().code()),
                                 ", or use --backend cpu");
  if (backend == "cuda") {
    return absl::FailedPreconditionError(StrCat("backend cuda: ", why));
  }
  spdlog::info("backend_chosen asked=auto backend=cpu reason=\"{}\"", why);
  return MakeCpuCodec(cpu);
}

}  // namespace kvshrink::service
