#include "kvs_layout.h"

#include <xxhash.h>

namespace kvshrink::client {
namespace {

template <typename Number>
Number Load(std::string_view bytes, size_t offset) {
  uint64_t value = 0;
  for (size_t i = 0; i < sizeof(Number); ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[offset + i])} << (8 * i);
  }
  return static_cast<Number>(value);
}

template <typename Number>
void Append(Number number, std::string* out) {
  for (size_t i = 0; i < sizeof(Number); ++i) {
    out->push_back(static_cast<char>(uint64_t{number} >> (8 * i)));
  }
}

}  // namespace

KvsHeader UnpackKvsHeader(std::string_view bytes) {
  KvsHeader header;
  header.version = Load<uint16_t>(bytes, 4);
  header.flags = Load<uint16_t>(bytes, 6);
  header.chunks = Load<uint32_t>(bytes, 8);
  header.layers = Load<uint32_t>(bytes, 12);
  header.metadata_bytes = Load<uint32_t>(bytes, 16);
  header.reserved = Load<uint32_t>(bytes, 20);
  header.directory_checksum = Load<uint64_t>(bytes, 24);
  header.metadata_checksum = Load<uint64_t>(bytes, 32);
  header.header_checksum = Load<uint64_t>(bytes, 40);
  return header;
}

std::string PackKvsHeader(const KvsHeader& header) {
  std::string out(kKvsMagic);
  Append(header.version, &out);
  Append(header.flags, &out);
  Append(header.chunks, &out);
  Append(header.layers, &out);
  Append(header.metadata_bytes, &out);
  Append(header.reserved, &out);
  Append(header.directory_checksum, &out);
  Append(header.metadata_checksum, &out);
  Append(KvsChecksum(out), &out);
  return out;
}

KvsEntry UnpackKvsEntry(std::string_view bytes) {
  return {Load<uint32_t>(bytes, 0), Load<uint32_t>(bytes, 4), Load<uint64_t>(bytes, 8),
          Load<uint64_t>(bytes, 16), Load<uint64_t>(bytes, 24)};
}

void AppendKvsEntry(const KvsEntry& entry, std::string* out) {
  Append(entry.chunk, out);
  Append(entry.layer, out);
  Append(entry.offset_bytes, out);
  Append(entry.length_bytes, out);
  Append(entry.checksum, out);
}

uint64_t KvsChecksum(std::string_view bytes) { return XXH64(bytes.data(), bytes.size(), 0); }

}  // namespace kvshrink::client
