#include "service/observe/state.h"

#include <string>
#include <utility>

namespace kvshrink::service {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<std::pair<std::string, std::string>>;

class Families {
 public:
  MetricFamily& Add(const char* name, const char* help, MetricType type) {
    families_.push_back({name, help, type, {}});
    return families_.back();
  }

  void Single(const char* name, const char* help, MetricType type, uint64_t value) {
    Append(Add(name, help, type), {}, value);
  }

  static void Append(MetricFamily& family, const Labels& labels, uint64_t value) {
    prometheus::ClientMetric metric;
    for (const auto& [label, text] : labels) {
      metric.label.push_back({label, text});
    }
    if (family.type == MetricType::Counter) {
      metric.counter.value = static_cast<double>(value);
    } else {
      metric.gauge.value = static_cast<double>(value);
    }
    family.metric.push_back(std::move(metric));
  }

  std::vector<MetricFamily> Take() { return std::move(families_); }

 private:
  std::vector<MetricFamily> families_;
};

void AddStore(const store::Store& store, Families& families) {
  const store::StoreCounters counters = store.Counters();
  MetricFamily& hits =
      families.Add("kvshrink_store_hits_total", "Shards found, by tier", MetricType::Counter);
  Families::Append(hits, {{"tier", "host"}}, counters.host_hits);
  Families::Append(hits, {{"tier", "disk"}}, counters.disk_hits);
  families.Single("kvshrink_store_misses_total", "Shards and keys not found", MetricType::Counter,
                  counters.misses);
  families.Single("kvshrink_store_evicted_chunks_total", "Chunks evicted from the last tier",
                  MetricType::Counter, counters.evicted_chunks);
  families.Single("kvshrink_store_quarantined_shards_total",
                  "Shards set aside because their bytes were damaged", MetricType::Counter,
                  counters.quarantined_shards);
  families.Single("kvshrink_store_expired_uncommitted_total",
                  "Uncommitted chunks dropped after their time", MetricType::Counter,
                  counters.expired_uncommitted);
  families.Single("kvshrink_store_chunks", "Committed chunks", MetricType::Gauge, store.chunks());
  families.Single("kvshrink_store_uncommitted_bytes", "Bytes of shards not yet committed",
                  MetricType::Gauge, store.uncommitted_bytes());
  const std::vector<store::TierUsage> usage = store.Usage();
  MetricFamily& used =
      families.Add("kvshrink_store_used_bytes", "Bytes held, by tier", MetricType::Gauge);
  for (const store::TierUsage& tier : usage) {
    Families::Append(used, {{"tier", TierLabel(tier.tier)}}, tier.used_bytes);
  }
  MetricFamily& capacity = families.Add("kvshrink_store_capacity_bytes",
                                        "Bytes that may be held, by tier", MetricType::Gauge);
  for (const store::TierUsage& tier : usage) {
    Families::Append(capacity, {{"tier", TierLabel(tier.tier)}}, tier.capacity_bytes);
  }
}

}  // namespace

std::vector<MetricFamily> StateMetrics(const DaemonState& state, const store::Store& store) {
  Families families;
  families.Single("kvshrink_inflight_bytes", "Memory promised to work in progress",
                  MetricType::Gauge, state.inflight_bytes);
  families.Single("kvshrink_inflight_capacity_bytes", "Memory that may be promised",
                  MetricType::Gauge, state.inflight_capacity_bytes);
  families.Single("kvshrink_inflight_objects", "Objects and requests admitted and not finished",
                  MetricType::Gauge, state.inflight_objects);
  families.Single("kvshrink_admission_refused_total", "Objects refused because the budget was full",
                  MetricType::Counter, state.refused);
  families.Single("kvshrink_executor_queued_jobs", "Jobs that wait for a thread", MetricType::Gauge,
                  state.queued_jobs);
  families.Single("kvshrink_open_streams", "Streaming RPCs open", MetricType::Gauge,
                  state.open_streams);
  families.Single("kvshrink_draining", "1 while the daemon drains", MetricType::Gauge,
                  state.draining ? 1 : 0);
  if (state.has_device) {
    families.Single("kvshrink_codec_device_lost",
                    "1 once the GPU has failed and the CPU does its work", MetricType::Gauge,
                    state.device_lost ? 1 : 0);
  }
  AddStore(store, families);
  return families.Take();
}

const char* TierLabel(store::TierName tier) {
  switch (tier) {
    case store::TierName::kDevice:
      return "device";
    case store::TierName::kHost:
      return "host";
    case store::TierName::kDisk:
      return "disk";
    case store::TierName::kCluster:
      return "cluster";
  }
  return "unknown";
}

}  // namespace kvshrink::service
