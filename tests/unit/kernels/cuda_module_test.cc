// Loading the CUDA module where it, the driver or the right build is missing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "kvshrink/cuda.h"

namespace kvshrink::cuda {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

void ExpectOneLine(const absl::Status& status, absl::StatusCode code) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("\n")));
  EXPECT_THAT(std::string(status.message()), HasSubstr("CUDA"));
}

TEST(CudaModule, MissingFile) {
  const auto api = LoadModule("/nonexistent/libkvshrink_cuda.so");
  ExpectOneLine(api.status(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(api.status().message()), HasSubstr("/nonexistent/libkvshrink_cuda.so"));
}

TEST(CudaModule, EnvironmentNamesTheFile) {
  ASSERT_EQ(setenv("KVSHRINK_CUDA_MODULE", "/nonexistent/named.so", 1), 0);
  const auto api = LoadModule();
  unsetenv("KVSHRINK_CUDA_MODULE");
  ExpectOneLine(api.status(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(api.status().message()), HasSubstr("/nonexistent/named.so"));
}

TEST(CudaModule, AnotherLibraryIsRefused) {
  ExpectOneLine(LoadModule("libstdc++.so.6").status(), absl::StatusCode::kFailedPrecondition);
}

TEST(CudaModule, LoadsOrSaysThatThereIsNoDevice) {
#ifdef KVSHRINK_CUDA_BUILT
  const auto api = LoadModule();
  if (api.ok()) {
    EXPECT_EQ((*api)->abi, kAbiVersion);
    EXPECT_TRUE(ToStatus(**api, kOk, "test").ok());
    ExpectOneLine(ToStatus(**api, kBadArgument, "test"), absl::StatusCode::kInvalidArgument);
  } else {
    ExpectOneLine(api.status(), absl::StatusCode::kUnavailable);
  }
#else
  GTEST_SKIP() << "built without the CUDA module";
#endif
}

}  // namespace
}  // namespace kvshrink::cuda
