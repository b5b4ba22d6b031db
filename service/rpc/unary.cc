#include "service/rpc/unary.h"

#include <algorithm>
#include <vector>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"
#include "service/rpc/convert.h"
#include "service/rpc/limits.h"

namespace kvshrink::service {
namespace {

// Runs `act` on each chunk of a request that answers with one status per chunk, in order.
template <class Request, class Response, class Act>
absl::Status ForEachChunk(const Environment& env, const std::string& tenant, Cancelled cancelled,
                          const Request& request, Response* response, Act act) {
  if (request.chunks_size() == 0 || request.chunks_size() > kMaxChunksPerRequest) {
    return BadArgument("chunks", StrCat(request.chunks_size(), " chunks"),
                       StrCat("must be 1..", kMaxChunksPerRequest));
  }
  for (int i = 0; i < request.chunks_size(); ++i) {
    if (cancelled()) {
      return absl::CancelledError("the client is gone");
    }
    absl::StatusOr<store::ChunkKey> key =
        ToChunkKey(tenant, request.chunks(i), StrCat("chunks[", i, "]"));
    const absl::Status status = key.ok() ? act(*key) : key.status();
    FillStatus(status, env.admission->retry_after_ms(), response->add_statuses());
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status DoLookup(Environment& env, const std::string& tenant, const v1::LookupRequest& request,
                      v1::LookupResponse* response) {
  if (request.namespace_().empty() || request.namespace_().size() > kMaxNamespaceBytes) {
    return BadArgument("namespace", StrCat(request.namespace_().size(), " bytes"),
                       StrCat("must be 1..", kMaxNamespaceBytes, " bytes of UTF-8"));
  }
  if (request.keys_size() > kMaxLookupKeys) {
    return BadArgument("keys", StrCat(request.keys_size(), " keys"),
                       StrCat("must be at most ", kMaxLookupKeys));
  }
  for (int i = 0; i < request.keys_size(); ++i) {
    if (request.keys(i).empty() || request.keys(i).size() > kMaxKeyBytes) {
      return BadArgument(StrCat("keys[", i, "]"), StrCat(request.keys(i).size(), " bytes"),
                         StrCat("must be 1..", kMaxKeyBytes, " bytes"));
    }
  }
  if (request.lease_ms() > kMaxLeaseMs) {
    return BadArgument("lease_ms", request.lease_ms(), StrCat("must be at most ", kMaxLeaseMs));
  }
  const uint32_t lease_ms = request.lease_ms() == 0 ? kDefaultLeaseMs : request.lease_ms();
  const std::vector<std::string> keys(request.keys().begin(), request.keys().end());
  const store::LookupResult found =
      env.store->Lookup(tenant, request.namespace_(), keys, int64_t{lease_ms});
  response->set_present(found.present);
  response->set_tokens(found.tokens);
  response->set_lease_id(found.lease_id);
  response->set_lease_ms(found.lease_id == 0 ? 0 : lease_ms);
  return absl::OkStatus();
}

absl::Status DoCommit(Environment& env, const std::string& tenant, Cancelled cancelled,
                      const v1::CommitRequest& request, v1::CommitResponse* response) {
  return ForEachChunk(env, tenant, cancelled, request, response,
                      [&env](const store::ChunkKey& key) { return env.store->Commit(key); });
}

absl::Status DoDelete(Environment& env, const std::string& tenant, Cancelled cancelled,
                      const v1::DeleteRequest& request, v1::DeleteResponse* response) {
  return ForEachChunk(env, tenant, cancelled, request, response,
                      [&env](const store::ChunkKey& key) { return env.store->Delete(key); });
}

absl::Status DoStat(Environment& env, const std::string& tenant, const v1::StatRequest& request,
                    v1::StatResponse* response) {
  absl::StatusOr<store::ChunkKey> key = ToChunkKey(tenant, request.chunk(), "chunk");
  if (!key.ok()) {
    return key.status();
  }
  absl::StatusOr<store::ChunkStat> stat = env.store->Stat(*key);
  if (!stat.ok()) {
    return stat.status();
  }
  FillChunkInfo(*stat, response->mutable_chunk());
  for (const store::ShardMeta& meta : stat->shards) {
    FillShardInfo(meta, response->add_shards());
  }
  return absl::OkStatus();
}

absl::Status DoList(Environment& env, const std::string& tenant, const v1::ListRequest& request,
                    v1::ListResponse* response) {
  if (request.namespace_().size() > kMaxNamespaceBytes) {
    return BadArgument("namespace", StrCat(request.namespace_().size(), " bytes"),
                       StrCat("must be at most ", kMaxNamespaceBytes, " bytes"));
  }
  if (request.page_size() > kMaxPageSize) {
    return BadArgument("page_size", request.page_size(), StrCat("must be at most ", kMaxPageSize));
  }
  const uint32_t asked = request.page_size() == 0 ? kDefaultPageSize : request.page_size();
  absl::StatusOr<store::ListPage> page = env.store->List(
      tenant, request.namespace_(), std::min(asked, kPageChunks), request.page_token());
  if (!page.ok()) {
    return page.status();
  }
  for (const store::ChunkStat& stat : page->chunks) {
    FillChunkInfo(stat, response->add_chunks());
  }
  response->set_next_page_token(page->next_page_token);
  return absl::OkStatus();
}

void FillServerInfo(const Environment& env, v1::ServerInfoResponse* response) {
  response->set_version(env.version);
  response->set_backend(std::string(env.codec->backend()));
  response->set_device(env.device);
  for (const ProfileInfo& profile : AllProfiles()) {
    response->add_profiles(std::string(profile.name));
  }
  response->set_default_profile(FromProfile(kDefaultProfile));
  response->set_max_frame_bytes(static_cast<uint32_t>(kMaxFrameBytes));
  response->set_max_object_bytes(env.max_object_bytes);
  response->set_inflight_capacity_bytes(env.admission->capacity_bytes());
  response->set_inflight_bytes(env.admission->inflight_bytes());
  for (const store::TierUsage& usage : env.store->Usage()) {
    v1::TierInfo* tier = response->add_tiers();
    tier->set_tier(FromTier(usage.tier));
    tier->set_capacity_bytes(usage.capacity_bytes);
    tier->set_used_bytes(usage.used_bytes);
  }
  response->set_chunks(env.store->chunks());
  response->set_uncommitted_bytes(env.store->uncommitted_bytes());
  response->set_draining(env.draining);
  for (const Basis& basis : env.bases->all()) {
    v1::BasisInfo* info = response->add_bases();
    info->set_id(std::string(basis.id().begin(), basis.id().end()));
    info->set_model(basis.model());
    info->set_head_dim(basis.head_dim());
    info->set_kv_heads(basis.kv_heads());
    for (const Basis::Layer& layer : basis.layers()) {
      info->add_layers(layer.layer);
    }
  }
}

}  // namespace kvshrink::service
