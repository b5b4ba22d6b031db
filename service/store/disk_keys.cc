#include "disk_keys.h"

#include "byte_code.h"
#include "limits.h"

namespace kvshrink::store {
namespace {

void AppendPart(std::string* out, std::string_view part) {
  AppendBigEndian(out, static_cast<uint16_t>(part.size()));
  out->append(part);
}

bool TakePart(std::string_view* in, size_t max_bytes, std::string* part) {
  uint16_t size = 0;
  if (!TakeBigEndian(in, &size)) return false;
  if (size == 0 || size > max_bytes || size > in->size()) return false;
  part->assign(in->substr(0, size));
  in->remove_prefix(size);
  return true;
}

}  // namespace

void AppendChunkKey(std::string* out, const ChunkKey& key) {
  AppendPart(out, key.tenant);
  AppendPart(out, key.name_space);
  AppendPart(out, key.key);
}

bool TakeChunkKey(std::string_view* in, ChunkKey* key) {
  return TakePart(in, kMaxTenantBytes, &key->tenant) &&
         TakePart(in, kMaxNamespaceBytes, &key->name_space) &&
         TakePart(in, kMaxKeyBytes, &key->key);
}

std::string RecordKey(char tag, const ChunkKey& key, uint64_t serial) {
  std::string out(1, tag);
  AppendChunkKey(&out, key);
  AppendBigEndian(&out, serial);
  return out;
}

std::string ShardKey(uint64_t serial, uint32_t layer) {
  std::string out;
  AppendBigEndian(&out, serial);
  AppendBigEndian(&out, layer);
  return out;
}

std::optional<ParsedRecordKey> ParseRecordKey(std::string_view record_key) {
  ParsedRecordKey parsed;
  if (record_key.empty()) return std::nullopt;
  record_key.remove_prefix(1);
  if (!TakeChunkKey(&record_key, &parsed.key)) return std::nullopt;
  if (!TakeBigEndian(&record_key, &parsed.serial) || !record_key.empty()) return std::nullopt;
  return parsed;
}

}  // namespace kvshrink::store
