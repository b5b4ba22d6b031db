// Sizes that the protocol fixes (proto/kvshrink/v1).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvshrink::service {

inline constexpr size_t kMaxFrameBytes = size_t{1} << 20;
inline constexpr size_t kMaxNamespaceBytes = 256;
inline constexpr size_t kMaxKeyBytes = 128;
inline constexpr uint32_t kMaxLayers = 4096;
inline constexpr int kMaxChunksPerRequest = 4096;
inline constexpr int kMaxLookupKeys = 65536;
inline constexpr uint32_t kDefaultLeaseMs = 30'000;
inline constexpr uint32_t kMaxLeaseMs = 600'000;
inline constexpr uint32_t kDefaultPageSize = 1000;
inline constexpr uint32_t kMaxPageSize = 10'000;
// What a page really holds at most, so that it stays below the 4 MiB that gRPC clients take by
// default.
inline constexpr uint32_t kPageChunks = 8000;
// The largest legal request: a Lookup of 65536 keys of 128 bytes, 3 bytes of framing each.
inline constexpr int kMaxMessageBytes = 9 << 20;

}  // namespace kvshrink::service
