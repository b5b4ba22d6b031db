// Any bytes as a trace (safetensors): refused with a data error, or every tensor lies inside the
// bytes.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "kvshrink/client/trace.h"

namespace {

using namespace kvshrink;

void Require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

void RequireInside(std::string_view bytes, const ConstTensor& tensor) {
  const auto* begin = reinterpret_cast<const std::byte*>(bytes.data());
  const uint64_t size = tensor.shape.entries() * DTypeBytes(tensor.dtype);
  Require(tensor.data >= begin && size <= bytes.size() &&
          tensor.data + size <= begin + bytes.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto trace = client::Trace::Parse(bytes);
  if (!trace.ok()) {
    Require(trace.status().code() == absl::StatusCode::kDataLoss);
    return 0;
  }
  for (const client::TraceLayer& layer : trace->layers()) {
    RequireInside(bytes, layer.k);
    if (layer.v) {
      RequireInside(bytes, *layer.v);
    }
  }
  return 0;
}
