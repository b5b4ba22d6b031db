// Calibration: the second moments of a model's queries over traces, trace by trace, and the basis
// that they make.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/basis.h"
#include "kvshrink/calibration.h"
#include "kvshrink/client/trace.h"

namespace kvshrink::client {

struct CalibrationSettings {
  // Of the keys that will be coded, by the trace's layer numbers. Absent: what each trace says.
  std::optional<LayerRopes> ropes;
  double eps = kDefaultCalibrationEps;
  std::optional<uint32_t> first_queries;  // of each layer of each trace; absent: all
  bool renumber = false;                  // layers 0, 1, ... by place, as the service numbers them
  std::string model;                      // absent: the first trace's `model`
};

// Sums over the traces so far. Traces must agree on layers, shapes and embeddings.
class Calibration {
 public:
  explicit Calibration(CalibrationSettings settings) : settings_(std::move(settings)) {}

  // Goes on from what SaveState wrote. Errors: DATA_LOSS (damaged), FAILED_PRECONDITION naming
  // the field (made with other settings).
  absl::Status LoadState(std::string_view bytes);
  std::string SaveState() const;

  // Adds all layers of a trace that have queries; one layer is in memory at a time. A trace at
  // `number` that is in the state already must be the one that is there. `progress`, may be null,
  // gets the bytes of queries read. Errors: naming file and field, INVALID_ARGUMENT (traces that
  // disagree, no queries, not finite), FAILED_PRECONDITION (another trace than before), those of
  // Trace::Open. After an error nothing of the trace is in the sums.
  absl::Status AddTrace(size_t number, const std::string& path,
                        const std::function<void(uint64_t)>& progress);

  size_t traces() const { return traces_.size(); }

  // The basis file of what was added. FAILED_PRECONDITION when that is nothing.
  absl::StatusOr<std::string> Finish() const;

 private:
  struct Layer {
    uint32_t number = 0;
    std::optional<Rope> rope;
    std::vector<double> moments;  // [kv_heads, head_dim, head_dim]
  };
  // What was added, for the state and the basis's metadata.
  struct Added {
    std::string path;
    uint64_t checksum = 0;  // of the file
  };

  // The trace's own sums, in the order of its layers.
  absl::StatusOr<std::vector<Layer>> SumTrace(const Trace& trace,
                                              const std::function<void(uint64_t)>& progress,
                                              uint64_t* queries) const;
  absl::Status CheckAgrees(const Trace& trace, const std::vector<Layer>& layers) const;
  std::string StateText() const;

  CalibrationSettings settings_;
  std::string model_;
  uint32_t head_dim_ = 0;
  uint32_t kv_heads_ = 0;
  uint64_t queries_ = 0;
  std::vector<Layer> layers_;
  std::vector<Added> traces_;
};

// Calibrates on `traces` and writes the basis at `out`. After each trace the sums so far are kept
// in `<out>.partial`; with `resume` they are taken up, so that a run that was killed ends with the
// same bytes as one that wasn't. `progress` gets trace by trace the bytes of queries read.
struct Calibrated {
  std::shared_ptr<const Basis> basis;
  uint64_t file_bytes = 0;
  size_t resumed_traces = 0;
};
absl::StatusOr<Calibrated> CalibrateToFile(const CalibrationSettings& settings,
                                           std::span<const std::string> traces,
                                           const std::string& out, bool resume,
                                           const std::function<void(uint64_t)>& progress);

}  // namespace kvshrink::client
