#include "uncommitted_pool.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "errors.h"
#include "limits.h"

namespace kvshrink::store {
namespace {

// An error names so many missing layers at most.
constexpr int kNamedLayers = 16;

absl::Status CheckAgrees(const PooledChunk& chunk, uint32_t layers, const ShardMeta& meta) {
  if (layers != chunk.layers) {
    return BadField("layers", layers, absl::StrCat("the chunk's other shards say ", chunk.layers));
  }
  const ShardMeta& other = chunk.shards.begin()->second.record.meta;
  if (meta.tokens != other.tokens) {
    return BadField("tokens", meta.tokens,
                    absl::StrCat("the chunk's other shards have ", other.tokens));
  }
  if (meta.first_token != other.first_token) {
    return BadField("first_token", meta.first_token,
                    absl::StrCat("the chunk's other shards have ", other.first_token));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status PooledChunk::CheckComplete() const {
  std::string missing;
  int named = 0;
  for (uint32_t layer = 0; layer < layers && named <= kNamedLayers; ++layer) {
    if (shards.contains(layer)) continue;
    absl::StrAppend(&missing, named == 0 ? "" : ", ");
    if (named++ == kNamedLayers) {
      absl::StrAppend(&missing, "...");
    } else {
      absl::StrAppend(&missing, layer);
    }
  }
  if (named == 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "field 'layers' is ", layers, ": ", layers - shards.size(), " missing, layers ", missing));
}

PooledChunk* UncommittedPool::Find(const ChunkKey& key) {
  const auto found = chunks_.find(key);
  return found == chunks_.end() ? nullptr : &*found->second;
}

absl::Status UncommittedPool::Add(const ChunkKey& key, uint32_t layers, PooledShard shard,
                                  int64_t now_steady_ms, int64_t now_unix_ms) {
  const ShardMeta& meta = shard.record.meta;
  const auto found = chunks_.find(key);
  if (found != chunks_.end()) {
    absl::Status status = CheckAgrees(*found->second, layers, meta);
    if (!status.ok()) return status;
  }
  const uint64_t charged = ChargedBytes(meta.bytes);
  if (charged > capacity_bytes_ || used_bytes_ > capacity_bytes_ - charged) {
    return absl::ResourceExhaustedError(
        absl::StrCat("field 'bytes' is ", meta.bytes, ": shards of uncommitted chunks hold ",
                     used_bytes_, " of ", capacity_bytes_, " bytes"));
  }
  Order::iterator chunk;
  if (found != chunks_.end()) {
    chunk = found->second;
    order_.splice(order_.end(), order_, chunk);
  } else {
    chunk = order_.insert(order_.end(), PooledChunk{.key = key, .layers = layers, .shards = {}});
    chunk->created_unix_ms = now_unix_ms;
    chunks_.emplace(key, chunk);
  }
  chunk->last_put_steady_ms = now_steady_ms;
  chunk->shards.emplace(meta.layer, std::move(shard));
  used_bytes_ += charged;
  return absl::OkStatus();
}

void UncommittedPool::Erase(const ChunkKey& key) {
  const auto found = chunks_.find(key);
  if (found == chunks_.end()) return;
  for (const auto& [layer, shard] : found->second->shards) {
    used_bytes_ -= ChargedBytes(shard.record.meta.bytes);
  }
  order_.erase(found->second);
  chunks_.erase(found);
}

uint64_t UncommittedPool::Expire(int64_t now_steady_ms) {
  uint64_t expired = 0;
  for (auto chunk = order_.begin(); chunk != order_.end();) {
    if (now_steady_ms - chunk->last_put_steady_ms < ttl_ms_) break;
    const PooledChunk& oldest = *chunk++;
    if (oldest.committing) continue;
    Erase(ChunkKey(oldest.key));  // a copy: the chunk's own key dies with it
    ++expired;
  }
  return expired;
}

}  // namespace kvshrink::store
