// The daemon's settings: defaults, then a config file, then KVSHRINK_* of the environment, then
// flags.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"

namespace kvshrink::service {

struct Options {
  std::string listen = "127.0.0.1:7420";  // host:port of gRPC; port 0 = a free one
  std::string http = "127.0.0.1:7421";    // host:port of metrics and probes; "" = off
  std::string backend = "auto";           // auto, cpu, cuda
  std::vector<std::string> bases;         // .kvb files of profile kvs2c; the first that fits codes
  std::string data_dir;                   // "" = no disk tier (ParseOptions fills in the default)
  uint64_t host_bytes = uint64_t{1} << 30;
  uint64_t disk_bytes = uint64_t{16} << 30;
  uint64_t uncommitted_bytes = uint64_t{1} << 30;
  uint64_t inflight_bytes = uint64_t{1} << 30;
  uint64_t max_object_bytes = uint64_t{256} << 20;
  uint64_t device_bytes = uint64_t{1} << 30;  // of the GPU's memory, with backend cuda
  int threads = 0;                            // of the codec; 0 = one per core
  int drain_timeout_s = 30;
  int stall_timeout_s = 60;
  int uncommitted_ttl_s = 600;
  std::string log_level = "info";
  std::string port_file;  // "" = none
};

// What the process should do at once instead of serving: print and exit (--help, --version, a bad
// value).
struct EarlyExit {
  int code = 0;      // 0, or 2 for bad usage
  std::string text;  // for stdout when code is 0, else one line for stderr
};

std::variant<Options, EarlyExit> ParseOptions(int argc, const char* const* argv);

// Checks what a parser can't: addresses, the backend's name, sizes.
// INVALID_ARGUMENT naming the flag.
absl::Status ValidateOptions(const Options& options);

// $XDG_DATA_HOME/kvshrink or ~/.local/share/kvshrink; "" when neither variable is set.
std::string DefaultDataDir();

}  // namespace kvshrink::service
