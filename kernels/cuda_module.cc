// Finds and loads the CUDA module.
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "absl/status/status.h"
#include "kvshrink/cuda.h"
#include "kvshrink/error.h"

namespace kvshrink::cuda {
namespace {

constexpr const char* kModuleFile = "libkvshrink_cuda.so";
using EntryPoint = const CudaApi* (*)(uint32_t);

std::string BesideExecutable() {
  std::error_code error;
  const auto executable = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) {
    return "";
  }
  const auto module = executable.parent_path() / kModuleFile;
  return std::filesystem::exists(module, error) ? module.string() : "";
}

std::string ModulePath(const std::string& asked) {
  if (!asked.empty()) {
    return asked;
  }
  if (const char* named = std::getenv("KVSHRINK_CUDA_MODULE"); named != nullptr && *named != 0) {
    return named;
  }
  const std::string beside = BesideExecutable();
  return beside.empty() ? kModuleFile : beside;
}

absl::Status CheckDevices(const CudaApi& api) {
  int count = 0;
  const int result = api.device_count(&count);
  if (result != kOk) {
    return absl::UnavailableError(StrCat("CUDA: ", api.result_text(result)));
  }
  return count > 0 ? absl::OkStatus() : absl::UnavailableError("CUDA: no device");
}

}  // namespace

absl::StatusOr<const CudaApi*> LoadModule(const std::string& path) {
  const std::string file = ModulePath(path);
  // Never closed: the driver's threads and the caller's streams outlive any owner.
  void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return absl::NotFoundError(StrCat("CUDA module: ", dlerror()));
  }
  const auto entry = reinterpret_cast<EntryPoint>(dlsym(handle, kEntryPoint));
  const CudaApi* api = entry == nullptr ? nullptr : entry(kAbiVersion);
  if (api == nullptr || api->abi != kAbiVersion) {
    return absl::FailedPreconditionError(
        StrCat("CUDA module ", file, ": not built for ABI ", kAbiVersion, " of this program"));
  }
  KVSHRINK_RETURN_IF_ERROR(CheckDevices(*api));
  return api;
}

absl::Status ToStatus(const CudaApi& api, int result, std::string_view what) {
  if (result == kOk) {
    return absl::OkStatus();
  }
  const auto text = StrCat("CUDA, ", what, ": ", api.result_text(result));
  return result == kBadArgument ? absl::InvalidArgumentError(text) : absl::InternalError(text);
}

}  // namespace kvshrink::cuda
