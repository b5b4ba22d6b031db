// What the RPCs work with.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "kvshrink/codec.h"
#include "service/engine/admission.h"
#include "service/engine/basis_set.h"
#include "service/engine/codec.h"
#include "service/engine/executor.h"
#include "service/observe/metrics.h"
#include "service/rpc/stream_registry.h"
#include "service/store/store.h"

namespace kvshrink::service {

// Owned by the server; everything in it outlives every RPC and every job.
struct Environment {
  store::Store* store = nullptr;
  const Backend* backend = nullptr;  // of the CPU: checks of shards, attention
  Codec* codec = nullptr;            // tensors to shards and back
  const BasisSet* bases = nullptr;
  Admission* admission = nullptr;
  Executor* executor = nullptr;
  Metrics* metrics = nullptr;
  StreamRegistry* streams = nullptr;

  uint64_t max_object_bytes = 0;
  uint64_t uncommitted_capacity_bytes = 0;
  std::string version;
  std::string device;  // name of the GPU, or of the CPU

  std::atomic<bool> draining = false;
};

}  // namespace kvshrink::service
