// Time as the store sees it, replaceable so that tests need not wait.
#pragma once

#include <cstdint>

namespace kvshrink::store {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  // Never goes back; leases and the life of uncommitted chunks are measured with it.
  virtual int64_t SteadyMs() const = 0;
  // Milliseconds since 1970, for what people and restarts see.
  virtual int64_t UnixMs() const = 0;
};

// The clocks of this machine; lives forever.
const Clock& SystemClock();

}  // namespace kvshrink::store
