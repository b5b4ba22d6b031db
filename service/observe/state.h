// Metrics that are read from the daemon's state when they are asked for, not counted as it runs.
#pragma once

#include <cstdint>
#include <vector>

#include "prometheus/metric_family.h"
#include "service/store/store.h"

namespace kvshrink::service {

struct DaemonState {
  uint64_t inflight_bytes = 0;
  uint64_t inflight_capacity_bytes = 0;
  uint64_t inflight_objects = 0;
  uint64_t refused = 0;
  uint64_t queued_jobs = 0;
  uint64_t open_streams = 0;
  bool draining = false;
  bool has_device = false;   // the codec has a GPU
  bool device_lost = false;  // which has failed
};

std::vector<prometheus::MetricFamily> StateMetrics(const DaemonState& state,
                                                   const store::Store& store);

// "device", "host", "disk", "cluster".
const char* TierLabel(store::TierName tier);

}  // namespace kvshrink::service
