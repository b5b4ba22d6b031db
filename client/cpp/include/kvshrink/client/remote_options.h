// How to reach a server and how long to wait for it.
#pragma once

#include <cstdint>
#include <string>

namespace kvshrink::client {

struct RemoteOptions {
  std::string server = "127.0.0.1:7420";  // host:port
  // For the first connection; a daemon that isn't there by then is UNAVAILABLE to the calls.
  int64_t connect_timeout_ms = 2'000;
  int64_t call_timeout_ms = 30'000;  // of a unary call
  int64_t idle_timeout_ms = 60'000;  // without progress on a stream
  int64_t stream_timeout_ms = 0;     // of a whole stream; 0 = none
  int64_t retry_for_ms = 60'000;     // from the first refusal of an object on; 0 = never try again
  uint64_t inflight_bytes = uint64_t{32} << 20;  // sent and not yet answered, per stream
  uint64_t max_body_bytes = uint64_t{1} << 31;   // of one answer
};

inline constexpr uint64_t kMaxFrameBytes = uint64_t{1} << 20;

}  // namespace kvshrink::client
