// Sizes, places and plain fields of .kvs files (proto/FORMAT.md section 8), for the reader and the
// writer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "kvshrink/client/kvs_file.h"

namespace kvshrink::client {

inline constexpr std::string_view kKvsMagic = "KVSF";
inline constexpr std::string_view kShardMagic = "KVS1";
inline constexpr uint16_t kKvsVersion = 1;
inline constexpr uint16_t kKvsFlagPreviews = 1;
inline constexpr size_t kKvsHeaderBytes = 48;
inline constexpr size_t kKvsCheckedHeaderBytes = 40;  // those before the header's own checksum
inline constexpr size_t kKvsEntryBytes = 32;
inline constexpr uint64_t kMinShardBytes = 96;

// Fields of a header that has the right size, as they are.
struct KvsHeader {
  uint16_t version = kKvsVersion;
  uint16_t flags = 0;
  uint32_t chunks = 0;
  uint32_t layers = 0;
  uint32_t metadata_bytes = 0;
  uint32_t reserved = 0;
  uint64_t directory_checksum = 0;
  uint64_t metadata_checksum = 0;
  uint64_t header_checksum = 0;
};

// `bytes` has at least the size of the structure.
KvsHeader UnpackKvsHeader(std::string_view bytes);
KvsEntry UnpackKvsEntry(std::string_view bytes);

// With the checksum that the other fields give; `header.header_checksum` is not read.
std::string PackKvsHeader(const KvsHeader& header);
void AppendKvsEntry(const KvsEntry& entry, std::string* out);

// XXH64 with seed 0.
uint64_t KvsChecksum(std::string_view bytes);

}  // namespace kvshrink::client
