#include "progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

constexpr auto kDrawEvery = std::chrono::milliseconds(100);
constexpr size_t kBarCells = 30;

}  // namespace

Progress::Progress(std::string label, uint64_t total_bytes)
    : label_(std::move(label)),
      total_bytes_(total_bytes),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(Clock::now()),
      next_draw_(start_ + kDrawEvery) {}

Progress::~Progress() {
  if (drawn_) {
    std::fputs("\r\x1b[K", stderr);
  }
}

void Progress::SetLabel(std::string label) { label_ = std::move(label); }

void Progress::Update(uint64_t done_bytes) {
  const Clock::time_point now = Clock::now();
  if (!terminal_ || now < next_draw_) {
    return;
  }
  next_draw_ = now + kDrawEvery;
  drawn_ = true;
  const double share =
      total_bytes_ > 0
          ? std::min(1.0, static_cast<double>(done_bytes) / static_cast<double>(total_bytes_))
          : 0;
  const auto filled = static_cast<size_t>(share * static_cast<double>(kBarCells));
  const std::chrono::duration<double> elapsed = now - start_;
  const std::string line =
      absl::StrFormat("\r\x1b[K%s [%s%s] %3.0f%% %s MB/s", label_, std::string(filled, '#'),
                      std::string(kBarCells - filled, '.'), 100 * share,
                      Fixed(MbPerSecond(done_bytes, elapsed.count()), 1));
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
}

}  // namespace kvshrink::cli
