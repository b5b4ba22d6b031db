// What the daemon counts. Names and labels: README.md of service/.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kvshrink/codec.h"
#include "prometheus/collectable.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace kvshrink::service {

// Thread-safe.
class Metrics {
 public:
  Metrics(std::string_view version, std::string_view backend);

  // An RPC ended; for a stream, as a whole.
  void RequestDone(std::string_view rpc, absl::StatusCode code);
  // An object of a stream was answered, `took` after its body was complete.
  void ObjectDone(std::string_view rpc, absl::StatusCode code, absl::Duration took);
  void BytesIn(std::string_view rpc, uint64_t bytes);
  void BytesOut(std::string_view rpc, uint64_t bytes);
  void Encoded(const ShardReport& report);
  // The codec made an object for an RPC, on `backend`.
  void CodecRan(std::string_view rpc, std::string_view backend);

  std::vector<prometheus::MetricFamily> Collect() const { return registry_.Collect(); }

 private:
  prometheus::Registry registry_;
  prometheus::Family<prometheus::Counter>& requests_;
  prometheus::Family<prometheus::Counter>& objects_;
  prometheus::Family<prometheus::Histogram>& object_seconds_;
  prometheus::Family<prometheus::Counter>& body_bytes_;
  prometheus::Counter& raw_bytes_;
  prometheus::Counter& encoded_bytes_;
  prometheus::Family<prometheus::Counter>& blocks_;
  prometheus::Family<prometheus::Counter>& codec_objects_;
};

// "OK", "INVALID_ARGUMENT", ...
std::string CodeName(absl::StatusCode code);

}  // namespace kvshrink::service
