// A progress bar on stderr, where that is a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace kvshrink::cli {

class Progress {
 public:
  Progress(std::string label, uint64_t total_bytes);
  ~Progress();  // takes the bar away
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Update(uint64_t done_bytes);
  void SetLabel(std::string label);

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  uint64_t total_bytes_;
  bool terminal_;
  bool drawn_ = false;
  Clock::time_point start_;
  Clock::time_point next_draw_;
};

}  // namespace kvshrink::cli
