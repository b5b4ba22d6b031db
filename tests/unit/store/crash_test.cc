// kill -9 at any moment: what was acknowledged is there, and no chunk is there in part.
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <random>
#include <thread>

#include "store_test_support.h"

extern char** environ;

namespace kvshrink::store {
namespace {

constexpr char kDirVariable[] = "KVSHRINK_CRASH_TEST_DIR";
constexpr char kRoundVariable[] = "KVSHRINK_CRASH_TEST_ROUND";
constexpr char kCapacityVariable[] = "KVSHRINK_CRASH_TEST_CAPACITY";
constexpr int kReportFd = 100;
constexpr uint32_t kLayers = 3;
constexpr size_t kSize = 20000;

// What the child reports when the store has answered. Written whole: smaller than a pipe's buffer.
struct Report {
  char act;  // 'c' committed, 'd' deletion begins, 'D' deleted
  uint32_t round;
  uint32_t number;
};

std::string Name(uint32_t round, uint32_t number) {
  return std::to_string(round) + "." + std::to_string(number);
}

StoreOptions Options(const std::string& dir, uint64_t disk_bytes) {
  StoreOptions options;
  options.data_dir = dir;
  options.disk_bytes = disk_bytes;
  return options;
}

// The process that dies, started by the test below only. Commits chunks without end, and deletes
// some of them.
TEST(CrashChild, DISABLED_Run) {
  const char* dir = std::getenv(kDirVariable);
  ASSERT_NE(dir, nullptr);
  const uint32_t round = static_cast<uint32_t>(std::atoi(std::getenv(kRoundVariable)));
  const std::unique_ptr<Store> store =
      OpenStore(Options(dir, std::strtoull(std::getenv(kCapacityVariable), nullptr, 10)));
  ASSERT_NE(store, nullptr);
  const auto report = [&](char act, uint32_t number) {
    const Report line = {act, round, number};
    ASSERT_EQ(write(kReportFd, &line, sizeof(line)), static_cast<ssize_t>(sizeof(line)));
  };
  for (uint32_t number = 0;; ++number) {
    ASSERT_TRUE(CommitChunk(store.get(), Key(Name(round, number)), kLayers, kSize).ok());
    report('c', number);
    if (number % 5 == 4) {
      report('d', number - 2);
      const absl::Status status = store->Delete(Key(Name(round, number - 2)));
      ASSERT_TRUE(status.ok() || absl::IsNotFound(status)) << status;
      report('D', number - 2);
    }
  }
}

class Crash : public testing::TestWithParam<uint64_t> {
 protected:
  // Starts a child, kills it after `life`, and returns its reports.
  std::vector<Report> RunAndKill(uint32_t round, std::chrono::microseconds life) {
    int pipe_fds[2];
    EXPECT_EQ(pipe2(pipe_fds, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipe_fds[1], kReportFd);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    setenv(kDirVariable, dir_.path().c_str(), 1);
    setenv(kRoundVariable, std::to_string(round).c_str(), 1);
    setenv(kCapacityVariable, std::to_string(GetParam()).c_str(), 1);
    std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
    std::string filter = "--gtest_filter=CrashChild.DISABLED_Run";
    std::string disabled = "--gtest_also_run_disabled_tests";
    char* arguments[] = {program.data(), filter.data(), disabled.data(), nullptr};
    pid_t child = 0;
    EXPECT_EQ(posix_spawn(&child, program.c_str(), &actions, nullptr, arguments, environ), 0);
    unsetenv(kDirVariable);
    posix_spawn_file_actions_destroy(&actions);
    close(pipe_fds[1]);

    // The child's life begins with its first report: else it would die in its start-up only.
    std::vector<Report> reports;
    std::thread killer;
    Report report;
    while (read(pipe_fds[0], &report, sizeof(report)) == sizeof(report)) {
      if (reports.empty()) {
        killer = std::thread([=] {
          std::this_thread::sleep_for(life);
          kill(child, SIGKILL);
        });
      }
      reports.push_back(report);
    }
    close(pipe_fds[0]);
    EXPECT_TRUE(killer.joinable()) << "the child ended without a report";
    if (killer.joinable()) killer.join();
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "ended by itself";
    return reports;
  }

  // Reads every listed chunk whole; returns their names.
  std::map<std::string, bool> ReadAll(Store* store) {
    std::map<std::string, bool> names;
    std::string token;
    do {
      const absl::StatusOr<ListPage> page = store->List("t", "", 0, token);
      EXPECT_TRUE(page.ok());
      for (const ChunkStat& chunk : page->chunks) {
        EXPECT_EQ(chunk.layers, kLayers);
        EXPECT_TRUE(IsWhole(store, chunk.key, kLayers, kSize));
        names[chunk.key.key] = true;
      }
      token = page->next_page_token;
    } while (!token.empty());
    return names;
  }

  TempDir dir_;
};

constexpr uint64_t kAmple = uint64_t{1} << 40;
constexpr uint64_t kTight = ChunkCost(kLayers * 6, kSize);
INSTANTIATE_TEST_SUITE_P(Capacity, Crash, testing::Values(kAmple, kTight), [](const auto& info) {
  return info.param == kAmple ? "Ample" : "Evicting";
});

TEST_P(Crash, KilledAtAnyMoment) {
  std::mt19937 random(20);
  std::map<std::string, char> acknowledged;  // name to last act
  for (uint32_t round = 0; round < 20; ++round) {
    SCOPED_TRACE(round);
    const std::chrono::microseconds life(random() % 60'000);
    for (const Report& report : RunAndKill(round, life)) {
      acknowledged[Name(report.round, report.number)] = report.act;
    }
    const std::unique_ptr<Store> store = OpenStore(Options(dir_.path(), GetParam()));
    ASSERT_NE(store, nullptr);
    const std::map<std::string, bool> present = ReadAll(store.get());
    EXPECT_EQ(store->Counters().quarantined_shards, 0u);
    EXPECT_EQ(store->uncommitted_bytes(), 0u);
    for (const auto& [name, act] : acknowledged) {
      if (act == 'D') {
        EXPECT_FALSE(present.contains(name)) << name << " was deleted";
      } else if (act == 'c' && GetParam() == kAmple) {  // without eviction it stays
        EXPECT_TRUE(present.contains(name)) << name;
      }
    }
    EXPECT_EQ(Used(*store, TierName::kDisk), present.size() * ChunkCost(kLayers, kSize));
  }
  EXPECT_GT(acknowledged.size(), 40u);  // else the children hardly lived
  // No shard is left that no chunk speaks of.
  const size_t chunks = OpenStore(Options(dir_.path(), GetParam()))->chunks();
  EXPECT_EQ(RawDatabase(dir_.path()).Shards().size(), chunks * kLayers);
}

}  // namespace
}  // namespace kvshrink::store
