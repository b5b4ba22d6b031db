#include "service/observe/metrics.h"

namespace kvshrink::service {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;

// Seconds: from a small decode to a large object on a loaded machine.
const prometheus::Histogram::BucketBoundaries& SecondsBuckets() {
  static const prometheus::Histogram::BucketBoundaries buckets = {
      0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30};
  return buckets;
}

}  // namespace

Metrics::Metrics(std::string_view version, std::string_view backend)
    : requests_(BuildCounter()
                    .Name("kvshrink_requests_total")
                    .Help("RPCs ended, by status code")
                    .Register(registry_)),
      objects_(BuildCounter()
                   .Name("kvshrink_objects_total")
                   .Help("Objects of streams answered, by status code")
                   .Register(registry_)),
      object_seconds_(BuildHistogram()
                          .Name("kvshrink_object_seconds")
                          .Help("From an object's complete body to its answer")
                          .Register(registry_)),
      body_bytes_(BuildCounter()
                      .Name("kvshrink_body_bytes_total")
                      .Help("Bytes of frames, received and sent")
                      .Register(registry_)),
      raw_bytes_(BuildCounter()
                     .Name("kvshrink_encode_raw_bytes_total")
                     .Help("Bytes of tensors that were encoded")
                     .Register(registry_)
                     .Add({})),
      encoded_bytes_(BuildCounter()
                         .Name("kvshrink_encode_shard_bytes_total")
                         .Help("Bytes of the shards they became")
                         .Register(registry_)
                         .Add({})),
      blocks_(BuildCounter()
                  .Name("kvshrink_encode_blocks_total")
                  .Help("Blocks encoded, by kind and by what became of them")
                  .Register(registry_)),
      codec_objects_(BuildCounter()
                         .Name("kvshrink_codec_objects_total")
                         .Help("Objects encoded or decoded, by what ran the codec")
                         .Register(registry_)) {
  BuildGauge()
      .Name("kvshrink_build_info")
      .Help("Always 1; version and backend as labels")
      .Register(registry_)
      .Add({{"version", std::string(version)}, {"backend", std::string(backend)}})
      .Set(1);
}

void Metrics::RequestDone(std::string_view rpc, absl::StatusCode code) {
  requests_.Add({{"rpc", std::string(rpc)}, {"code", CodeName(code)}}).Increment();
}

void Metrics::ObjectDone(std::string_view rpc, absl::StatusCode code, absl::Duration took) {
  objects_.Add({{"rpc", std::string(rpc)}, {"code", CodeName(code)}}).Increment();
  object_seconds_.Add({{"rpc", std::string(rpc)}}, SecondsBuckets())
      .Observe(absl::ToDoubleSeconds(took));
}

void Metrics::BytesIn(std::string_view rpc, uint64_t bytes) {
  body_bytes_.Add({{"rpc", std::string(rpc)}, {"direction", "in"}})
      .Increment(static_cast<double>(bytes));
}

void Metrics::BytesOut(std::string_view rpc, uint64_t bytes) {
  body_bytes_.Add({{"rpc", std::string(rpc)}, {"direction", "out"}})
      .Increment(static_cast<double>(bytes));
}

void Metrics::Encoded(const ShardReport& report) {
  raw_bytes_.Increment(static_cast<double>(report.raw_bytes));
  encoded_bytes_.Increment(static_cast<double>(report.encoded_bytes));
  const auto add = [this](const char* kind, const KindReport& blocks) {
    const uint32_t coded = blocks.blocks - blocks.raw_blocks;
    blocks_.Add({{"kind", kind}, {"state", "coded"}}).Increment(coded);
    blocks_.Add({{"kind", kind}, {"state", "raw"}}).Increment(blocks.raw_blocks);
    blocks_.Add({{"kind", kind}, {"state", "escalated"}}).Increment(blocks.escalated_blocks);
  };
  add("k", report.k);
  add("v", report.v);
}

void Metrics::CodecRan(std::string_view rpc, std::string_view backend) {
  codec_objects_.Add({{"rpc", std::string(rpc)}, {"backend", std::string(backend)}}).Increment();
}

std::string CodeName(absl::StatusCode code) { return absl::StatusCodeToString(code); }

}  // namespace kvshrink::service
