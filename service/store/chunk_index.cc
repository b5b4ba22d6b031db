#include "chunk_index.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace kvshrink::store {

IndexedChunk* ChunkIndex::Find(const ChunkKey& key) {
  const auto found = chunks_.find(key);
  return found == chunks_.end() ? nullptr : &found->second;
}

IndexedChunk* ChunkIndex::FindSerial(uint64_t serial) {
  const auto found = by_serial_.find(serial);
  return found == by_serial_.end() ? nullptr : &found->second->second;
}

void ChunkIndex::Insert(const ChunkKey& key, ChunkRecord record) {
  const auto [added, fresh] = chunks_.try_emplace(key);
  IndexedChunk& chunk = added->second;
  chunk.charged_bytes = record.charged_bytes();
  chunk.record = std::move(record);
  chunk.use = uses_.insert(uses_.end(), &added->first);
  by_serial_.emplace(chunk.record.serial, added);
  used_bytes_ += chunk.charged_bytes;
}

void ChunkIndex::Touch(IndexedChunk* chunk) { uses_.splice(uses_.end(), uses_, chunk->use); }

ChunkIndex::Node ChunkIndex::Take(const ChunkKey& key) {
  Node node = chunks_.extract(key);
  IndexedChunk& chunk = node.mapped();
  uses_.erase(chunk.use);
  by_serial_.erase(chunk.record.serial);
  used_bytes_ -= chunk.charged_bytes;
  return node;
}

void ChunkIndex::PutBack(Node node) {
  auto result = chunks_.insert(std::move(node));
  if (!result.inserted) return;
  IndexedChunk& chunk = result.position->second;
  chunk.leases = 0;
  chunk.use = uses_.insert(uses_.begin(), &result.position->first);
  by_serial_.emplace(chunk.record.serial, result.position);
  used_bytes_ += chunk.charged_bytes;
}

absl::StatusOr<std::vector<ChunkIndex::Node>> ChunkIndex::Evict(uint64_t bytes) {
  std::vector<ChunkKey> victims;
  uint64_t freed = 0;
  for (const ChunkKey* key : uses_) {
    if (freed >= bytes) break;
    const IndexedChunk& chunk = *Find(*key);
    if (chunk.leases > 0) continue;
    freed += chunk.charged_bytes;
    victims.push_back(*key);
  }
  if (freed < bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(bytes, " bytes are needed, but of ",
                                                     used_bytes_, " bytes in use all but ", freed,
                                                     " are held by leases"));
  }
  std::vector<Node> nodes;
  nodes.reserve(victims.size());
  for (const ChunkKey& key : victims) nodes.push_back(Take(key));
  return nodes;
}

}  // namespace kvshrink::store
