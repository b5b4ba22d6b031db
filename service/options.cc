#include "service/options.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "kvshrink/error.h"
#include "service/observe/address.h"
#include "service/version.h"

namespace kvshrink::service {
namespace {

constexpr int kUsageError = 2;
constexpr int kMaxThreads = 1024;
constexpr int kDaySeconds = 24 * 60 * 60;

// "--host-bytes" -> "KVSHRINK_HOST_BYTES".
std::string EnvironmentName(const std::string& flag) {
  std::string name = absl::StrReplaceAll(flag.substr(2), {{"-", "_"}});
  for (char& c : name) {
    c = static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
  }
  return absl::StrCat("KVSHRINK_", name);
}

template <typename Value>
CLI::Option* Add(CLI::App& app, const std::string& flag, Value& value, const std::string& help) {
  return app.add_option(flag, value, help)->envname(EnvironmentName(flag))->capture_default_str();
}

// CLI11 reads "-5" as 2^64 - 5.
std::string RefuseSign(const std::string& text) {
  return text.starts_with('-') ? absl::StrCat("Value ", text, " is negative") : "";
}

void AddSize(CLI::App& app, const std::string& flag, uint64_t& bytes, const std::string& help) {
  Add(app, flag, bytes, help)
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->transform(CLI::Validator(RefuseSign, "", "sign"))  // added last, runs first
      ->type_name("SIZE")
      ->default_str(absl::StrCat(bytes >> 20, "MiB"));
}

void AddFlags(CLI::App& app, Options& options) {
  Add(app, "--listen", options.listen, "host:port of gRPC; port 0 = a free one");
  Add(app, "--http", options.http, "host:port of /metrics, /healthz, /readyz; \"\" = off");
  Add(app, "--backend", options.backend, "what runs the codec; auto = the GPU where there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  app.add_option("--basis", options.bases,
                 "calibrated basis (.kvb) of profile kvs2c; may be repeated: the first that fits "
                 "codes, all decode")
      ->envname(EnvironmentName("--basis"));
  Add(app, "--data-dir", options.data_dir, "folder of the disk tier; \"\" = no disk tier");
  AddSize(app, "--host-bytes", options.host_bytes, "capacity of the host tier");
  AddSize(app, "--disk-bytes", options.disk_bytes, "capacity of the disk tier");
  AddSize(app, "--uncommitted-bytes", options.uncommitted_bytes,
          "shards of chunks that aren't committed");
  AddSize(app, "--inflight-bytes", options.inflight_bytes,
          "memory of requests in progress; more are refused");
  AddSize(app, "--max-object-bytes", options.max_object_bytes, "largest body of one object");
  AddSize(app, "--device-bytes", options.device_bytes,
          "the GPU's memory for objects in work; larger ones go to the CPU");
  Add(app, "--threads", options.threads, "threads of the codec; 0 = one per core")
      ->check(CLI::Range(0, kMaxThreads));
  Add(app, "--drain-timeout", options.drain_timeout_s, "seconds to finish work after SIGTERM")
      ->check(CLI::Range(0, kDaySeconds));
  Add(app, "--stall-timeout", options.stall_timeout_s,
      "seconds after which a client that holds memory and neither sends nor reads is cut off")
      ->check(CLI::Range(1, kDaySeconds));
  Add(app, "--uncommitted-ttl", options.uncommitted_ttl_s,
      "seconds after which uncommitted chunks are dropped")
      ->check(CLI::Range(1, 30 * kDaySeconds));
  Add(app, "--log-level", options.log_level, "least severe events that are logged")
      ->check(CLI::IsMember({"debug", "info", "warn", "error", "off"}));
  Add(app, "--port-file", options.port_file,
      "file that gets {\"listen\": ..., \"http\": ...} once the daemon serves");
}

bool Given(const std::vector<std::string>& args, const std::string& flag) {
  return std::any_of(args.begin(), args.end(), [&flag](const std::string& arg) {
    return arg == flag || arg.starts_with(flag + "=");
  });
}

// Adds the flags that the environment sets and the command line doesn't. CLI11 would do so by
// itself, but rank the environment below the config file. An empty variable counts as not set,
// but for the flags to which empty means something.
void AddEnvironment(const CLI::App& app, std::vector<std::string>& args) {
  std::vector<std::string> added;
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = option->get_envname();
    const char* value = name.empty() ? nullptr : std::getenv(name.c_str());
    const std::string flag = option->get_name();
    const bool may_be_empty = flag == "--http" || flag == "--data-dir";
    if (value != nullptr && (*value != '\0' || may_be_empty) && !Given(args, flag)) {
      added.insert(added.end(), {flag, value});
    }
  }
  args.insert(args.begin(), added.begin(), added.end());
}

std::string FirstLine(std::string_view text) {
  return std::string(text.substr(0, text.find('\n')));
}

}  // namespace

std::variant<Options, EarlyExit> ParseOptions(int argc, const char* const* argv) {
  Options options;
  options.data_dir = DefaultDataDir();
  CLI::App app("kvshrinkd: compresses KV cache, keeps it, gives it back", "kvshrinkd");
  app.set_version_flag("--version", absl::StrCat("kvshrinkd ", kVersion));
  app.set_config("--config", "", "file with these settings, flag = value, one a line")
      ->envname("KVSHRINK_CONFIG");
  app.allow_config_extras(false);
  AddFlags(app, options);
  std::vector<std::string> args(argv + 1, argv + argc);
  AddEnvironment(app, args);
  std::reverse(args.begin(), args.end());  // the order in which CLI11 takes a vector
  try {
    app.parse(std::move(args));
  } catch (const CLI::CallForHelp&) {
    return EarlyExit{0, app.help()};
  } catch (const CLI::CallForVersion&) {
    return EarlyExit{0, absl::StrCat("kvshrinkd ", kVersion, "\n")};
  } catch (const CLI::ParseError& error) {  // how the library reports bad usage
    return EarlyExit{kUsageError, absl::StrCat("kvshrinkd: ", FirstLine(error.what()))};
  }
  if (absl::Status status = ValidateOptions(options); !status.ok()) {
    return EarlyExit{kUsageError, absl::StrCat("kvshrinkd: ", status.message())};
  }
  return options;
}

absl::Status ValidateOptions(const Options& options) {
  KVSHRINK_RETURN_IF_ERROR(HostPort::Parse("listen", options.listen).status());
  if (!options.http.empty()) {
    KVSHRINK_RETURN_IF_ERROR(HostPort::Parse("http", options.http).status());
  }
  if (options.backend != "auto" && options.backend != "cpu" && options.backend != "cuda") {
    return BadArgument("backend", options.backend, "must be auto, cpu or cuda");
  }
  const std::pair<std::string_view, uint64_t> sizes[] = {
      {"host-bytes", options.host_bytes},
      {"disk-bytes", options.disk_bytes},
      {"uncommitted-bytes", options.uncommitted_bytes},
      {"inflight-bytes", options.inflight_bytes},
      {"max-object-bytes", options.max_object_bytes},
      {"device-bytes", options.device_bytes}};
  constexpr uint64_t kMostBytes = uint64_t{1} << 62;
  for (const auto& [flag, bytes] : sizes) {
    if (bytes == 0 || bytes > kMostBytes) {
      return BadArgument(flag, bytes, absl::StrCat("must be 1..", kMostBytes));
    }
  }
  return absl::OkStatus();
}

std::string DefaultDataDir() {
  const char* data_home = std::getenv("XDG_DATA_HOME");
  if (data_home != nullptr && data_home[0] == '/') {  // the standard: other values are ignored
    return absl::StrCat(data_home, "/kvshrink");
  }
  const char* home = std::getenv("HOME");
  if (home != nullptr && home[0] != '\0') {
    return absl::StrCat(home, "/.local/share/kvshrink");
  }
  return "";
}

}  // namespace kvshrink::service
