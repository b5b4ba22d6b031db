#include "kvshrink/codec.h"

namespace kvshrink {

Backend::~Backend() = default;

void Backend::ForEach(size_t count, absl::FunctionRef<void(size_t)> body) const {
  for (size_t i = 0; i < count; ++i) {
    body(i);
  }
}

}  // namespace kvshrink
