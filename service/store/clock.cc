#include "clock.h"

#include <chrono>

namespace kvshrink::store {
namespace {

template <typename Source>
int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Source::now().time_since_epoch())
      .count();
}

class MachineClock : public Clock {
 public:
  int64_t SteadyMs() const override { return NowMs<std::chrono::steady_clock>(); }
  int64_t UnixMs() const override { return NowMs<std::chrono::system_clock>(); }
};

}  // namespace

const Clock& SystemClock() {
  static const MachineClock* const clock = new MachineClock;
  return *clock;
}

}  // namespace kvshrink::store
