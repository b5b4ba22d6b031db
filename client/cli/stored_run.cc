#include "stored_run.h"

#include <algorithm>
#include <utility>

#include "kvshrink/client/chunk_keys.h"
#include "kvshrink/client/status.h"

namespace kvshrink::cli {
namespace {

constexpr uint32_t kFirstKeys = 1024;
constexpr uint32_t kMaxKeys = 65536;  // of one Lookup
constexpr uint32_t kLeaseMs = 600'000;

}  // namespace

absl::StatusOr<StoredRun> StoredRun::Find(client::Remote* remote, const std::string& name_space,
                                          const std::string& prefix) {
  // How long the run is, is known only when a key is missing.
  for (uint32_t count = kFirstKeys;; count = std::min(kMaxKeys, count * 8)) {
    StoredRun run(remote);
    run.keys_ = client::ChunkKeys(prefix, count);
    KVSHRINK_ASSIGN_OR_RETURN(const v1::LookupResponse found,
                              remote->Lookup(name_space, run.keys_, kLeaseMs));
    run.lease_id_ = found.lease_id();
    run.tokens_ = found.tokens();
    if (found.present() < count || count == kMaxKeys) {
      run.keys_.resize(found.present());
      return run;
    }
  }
}

absl::StatusOr<StoredRun> StoredRun::Require(client::Remote* remote, const std::string& name_space,
                                             const std::string& prefix) {
  auto run = Find(remote, name_space, prefix);
  if (run.ok() && run->keys_.empty()) {
    return absl::NotFoundError(StrCat("namespace '", name_space, "' has no committed chunk '",
                                      client::ChunkKey(prefix, 0), "'"));
  }
  return run;
}

StoredRun::StoredRun(StoredRun&& other) noexcept
    : remote_(other.remote_),
      keys_(std::move(other.keys_)),
      tokens_(other.tokens_),
      lease_id_(std::exchange(other.lease_id_, 0)) {}

StoredRun::~StoredRun() {
  if (lease_id_ != 0) {
    // It ends by itself when this doesn't reach the server.
    remote_->Release(lease_id_).status().IgnoreError();
  }
}

}  // namespace kvshrink::cli
