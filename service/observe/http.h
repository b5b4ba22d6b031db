// The HTTP side: /metrics for Prometheus, /healthz and /readyz for probes.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "prometheus/metric_family.h"

namespace kvshrink::service {

struct HttpHooks {
  std::function<std::vector<prometheus::MetricFamily>()> metrics;
  std::function<bool()> ready;  // false: /readyz answers 503
};

class HttpServer {
 public:
  // Listens on `address` (host:port; port 0 = a free one). The hooks are called on its threads
  // until it is destroyed. Errors: UNAVAILABLE when the address can't be bound, INVALID_ARGUMENT
  // when it is none.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address,
                                                           HttpHooks hooks);
  virtual ~HttpServer() = default;

  // host:port with the port that was bound.
  virtual const std::string& address() const = 0;
};

}  // namespace kvshrink::service
