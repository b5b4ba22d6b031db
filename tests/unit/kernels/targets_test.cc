// One input gives one shard, whatever the vector length of the processor: the test runs itself once
// per instruction set.
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>

#include "blocks.h"
#include "cpu/loops.h"
#include "hwy/targets.h"

namespace kvshrink {
namespace {

// popen runs a shell: its /proc/self is not ours.
std::string Program() { return std::filesystem::read_symlink("/proc/self/exe").string(); }

std::string RunProgram(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  std::string out;
  char buffer[256];
  while (pipe != nullptr && fgets(buffer, sizeof(buffer), pipe.get()) != nullptr) {
    out += buffer;
  }
  return out;
}

void PrintChecksums() {
  const auto backend = MakeCpuBackend(1);
  const testing::Tensor k = testing::QwenLayer("k", 10);
  const testing::Tensor v = testing::LowRankPlusNoise({512, 2, 64}, 3, 0.3F, 5);
  const testing::Tensor odd = testing::LowRankPlusNoise({77, 1, 83}, 3, 0.3F, 6);
  std::printf("%s", cpu::ChooseLoops().target);
  for (const ProfileInfo& profile : testing::PlainProfiles()) {
    for (const auto& [a, b] : {std::pair(&k, &v), std::pair(&odd, &odd)}) {
      const std::string bytes =
          *EncodeShard(*backend, a->View(), b->View(), testing::OptionsOf(profile.profile));
      std::printf(" %016llx",
                  static_cast<unsigned long long>(XXH64(bytes.data(), bytes.size(), 0)));
    }
  }
  std::printf("\n");
}

TEST(Targets, EveryInstructionSetWithFusedMultiplyAddGivesTheSameShards) {
  // A target that this build doesn't have runs as one of these.
  const std::set<std::string> unfused = {"SCALAR", "EMU128", "SSE2", "SSSE3", "SSE4"};
  std::string first;
  for (int64_t rest = hwy::SupportedTargets(); rest != 0; rest &= rest - 1) {
    const int64_t target = rest & -rest;
    const std::string line = RunProgram(Program() + " " + std::to_string(target));
    const size_t name_end = line.find(' ');
    ASSERT_NE(name_end, std::string::npos) << line;
    const std::string checksums = line.substr(name_end);
    if (unfused.contains(line.substr(0, name_end))) {
      continue;
    }
    std::printf("%s\n", line.substr(0, name_end).c_str());
    first = first.empty() ? checksums : first;
    EXPECT_EQ(checksums, first) << line;
  }
}

}  // namespace
}  // namespace kvshrink

int main(int argc, char** argv) {
  if (argc == 2 && argv[1][0] != '-') {
    hwy::SetSupportedTargetsForTest(std::strtoll(argv[1], nullptr, 10));
    kvshrink::PrintChecksums();
    return 0;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
