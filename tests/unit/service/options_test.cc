// Flags, environment, config file, and what bad values get; the port file.
#include "service/options.h"

#include <stdlib.h>

#include <fstream>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "service/observe/address.h"
#include "service/port_file.h"

namespace kvshrink::service {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::variant<Options, EarlyExit> Parse(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "kvshrinkd");
  return ParseOptions(static_cast<int>(flags.size()), flags.data());
}

Options Good(std::vector<const char*> flags) {
  auto parsed = Parse(std::move(flags));
  if (const EarlyExit* early = std::get_if<EarlyExit>(&parsed)) {
    ADD_FAILURE() << early->text;
    return {};
  }
  return std::get<Options>(parsed);
}

EarlyExit Bad(std::vector<const char*> flags) {
  auto parsed = Parse(std::move(flags));
  EXPECT_TRUE(std::holds_alternative<EarlyExit>(parsed));
  return std::holds_alternative<EarlyExit>(parsed) ? std::get<EarlyExit>(parsed) : EarlyExit{};
}

class OptionsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    setenv("XDG_DATA_HOME", "/data-home", 1);
    for (const char* name :
         {"KVSHRINK_LISTEN", "KVSHRINK_HOST_BYTES", "KVSHRINK_CONFIG", "KVSHRINK_DATA_DIR"}) {
      unsetenv(name);
    }
  }
};

TEST_F(OptionsTest, Defaults) {
  const Options options = Good({});
  EXPECT_EQ(options.listen, "127.0.0.1:7420");
  EXPECT_EQ(options.http, "127.0.0.1:7421");
  EXPECT_EQ(options.backend, "auto");
  EXPECT_EQ(options.data_dir, "/data-home/kvshrink");
  EXPECT_EQ(options.max_object_bytes, 256U << 20);
  EXPECT_EQ(options.device_bytes, uint64_t{1} << 30);
}

TEST_F(OptionsTest, DataDirFallsBackToHome) {
  setenv("XDG_DATA_HOME", "relative", 1);
  setenv("HOME", "/home/someone", 1);
  EXPECT_EQ(DefaultDataDir(), "/home/someone/.local/share/kvshrink");
}

TEST_F(OptionsTest, FlagsAndSizes) {
  const Options options =
      Good({"--listen", "[::1]:0", "--http", "", "--data-dir", "", "--host-bytes", "512MiB",
            "--disk-bytes=2GiB", "--inflight-bytes", "1000", "--uncommitted-bytes", "3kb",
            "--threads", "3", "--backend", "cuda", "--device-bytes", "64MiB"});
  EXPECT_EQ(options.backend, "cuda");
  EXPECT_EQ(options.device_bytes, uint64_t{64} << 20);
  EXPECT_EQ(options.listen, "[::1]:0");
  EXPECT_EQ(options.http, "");
  EXPECT_EQ(options.data_dir, "");
  EXPECT_EQ(options.host_bytes, uint64_t{512} << 20);
  EXPECT_EQ(options.disk_bytes, uint64_t{2} << 30);
  EXPECT_EQ(options.inflight_bytes, 1000U);
  EXPECT_EQ(options.uncommitted_bytes, 3000U);
  EXPECT_EQ(options.threads, 3);
}

TEST_F(OptionsTest, ConfigThenEnvironmentThenFlags) {
  const std::string path = ::testing::TempDir() + "kvshrinkd_options_test.toml";
  std::ofstream(path) << "listen = \"127.0.0.1:1\"\nhost-bytes = \"64MiB\"\ndrain-timeout = 7\n";
  Options options = Good({"--config", path.c_str()});
  EXPECT_EQ(options.listen, "127.0.0.1:1");
  EXPECT_EQ(options.host_bytes, uint64_t{64} << 20);
  EXPECT_EQ(options.drain_timeout_s, 7);
  setenv("KVSHRINK_LISTEN", "127.0.0.1:2", 1);
  setenv("KVSHRINK_HOST_BYTES", "32MiB", 1);
  options = Good({"--config", path.c_str(), "--listen", "127.0.0.1:3"});
  EXPECT_EQ(options.listen, "127.0.0.1:3");
  EXPECT_EQ(options.host_bytes, uint64_t{32} << 20);
  setenv("KVSHRINK_DATA_DIR", "", 1);
  setenv("KVSHRINK_CONFIG", path.c_str(), 1);
  options = Good({});
  EXPECT_EQ(options.data_dir, "");
  EXPECT_EQ(options.drain_timeout_s, 7);
  EXPECT_EQ(options.host_bytes, uint64_t{32} << 20);
  setenv("KVSHRINK_HOST_BYTES", "much", 1);
  EXPECT_EQ(Bad({}).code, 2);
}

TEST_F(OptionsTest, BadValuesExitWithOneLineThatNamesThem) {
  const std::pair<std::vector<const char*>, const char*> cases[] = {
      {{"--host-bytes", "12x"}, "--host-bytes"},
      {{"--host-bytes", "-5"}, "--host-bytes"},
      {{"--host-bytes", "0"}, "host-bytes"},
      {{"--disk-bytes", "99999999999GiB"}, "--disk-bytes"},
      {{"--listen", "nowhere"}, "'listen' is nowhere"},
      {{"--listen", "127.0.0.1:70000"}, "'listen' is 127.0.0.1:70000"},
      {{"--http", "127.0.0.1:80s"}, "'http' is 127.0.0.1:80s"},
      {{"--device-bytes", "0"}, "device-bytes"},
      {{"--backend", "tpu"}, "--backend"},
      {{"--threads", "-1"}, "--threads"},
      {{"--drain-timeout", "soon"}, "--drain-timeout"},
      {{"--log-level", "loud"}, "--log-level"},
      {{"--config", "/does/not/exist"}, "/does/not/exist"},
      {{"--no-such-flag"}, "--no-such-flag"},
      {{"stray"}, "stray"}};
  for (const auto& [flags, text] : cases) {
    const EarlyExit exit = Bad(flags);
    EXPECT_EQ(exit.code, 2) << flags[0];
    EXPECT_THAT(exit.text, StartsWith("kvshrinkd: "));
    EXPECT_THAT(exit.text, HasSubstr(text));
    EXPECT_EQ(exit.text.find('\n'), std::string::npos) << exit.text;
  }
}

TEST_F(OptionsTest, UnknownKeyOfTheConfigFileIsAnError) {
  const std::string path = ::testing::TempDir() + "kvshrinkd_unknown_key.toml";
  std::ofstream(path) << "lissten = \"127.0.0.1:1\"\n";
  const EarlyExit exit = Bad({"--config", path.c_str()});
  EXPECT_EQ(exit.code, 2);
  EXPECT_THAT(exit.text, HasSubstr("lissten"));
}

TEST_F(OptionsTest, HelpAndVersionExitWithZero) {
  EXPECT_EQ(Bad({"--help"}).code, 0);
  EXPECT_THAT(Bad({"--help"}).text, HasSubstr("KVSHRINK_INFLIGHT_BYTES"));
  EXPECT_THAT(Bad({"--version"}).text, StartsWith("kvshrinkd "));
}

TEST(HostPort, ParsesAndPrints) {
  EXPECT_EQ(HostPort::Parse("x", "localhost:0").value().ToString(), "localhost:0");
  EXPECT_EQ(HostPort::Parse("x", "[::]:7420").value().port, 7420);
  for (const char* bad : {"", ":1", "host", "host:", "host:-1", "::1:5", "a b:1", "[]:1"}) {
    EXPECT_FALSE(HostPort::Parse("x", bad).ok()) << bad;
  }
}

TEST(PortFile, IsWrittenWhole) {
  const std::string path = ::testing::TempDir() + "kvshrinkd_port_file.json";
  ASSERT_TRUE(WritePortFile(path, "127.0.0.1:1", "").ok());
  ASSERT_TRUE(WritePortFile(path, "127.0.0.1:2", "127.0.0.1:3").ok());
  std::ifstream file(path);
  const nlohmann::json content = nlohmann::json::parse(file);
  EXPECT_EQ(content["listen"], "127.0.0.1:2");
  EXPECT_EQ(content["http"], "127.0.0.1:3");
  const absl::Status status = WritePortFile("/does/not/exist/file", "a", "b");
  EXPECT_THAT(std::string(status.message()), HasSubstr("/does/not/exist/file"));
}

}  // namespace
}  // namespace kvshrink::service
