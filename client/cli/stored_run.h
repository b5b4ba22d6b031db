// The chunks of a prefix that a server has, found and held.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kvshrink/client/remote.h"

namespace kvshrink::cli {

// The longest run "<prefix>/0", "<prefix>/1", ... that is committed. Leased until this object goes,
// so that nothing of it is evicted.
class StoredRun {
 public:
  // An empty run when there is nothing. `remote` must outlive it.
  static absl::StatusOr<StoredRun> Find(client::Remote* remote, const std::string& name_space,
                                        const std::string& prefix);
  // The same, NOT_FOUND when there is nothing.
  static absl::StatusOr<StoredRun> Require(client::Remote* remote, const std::string& name_space,
                                           const std::string& prefix);
  StoredRun(StoredRun&& other) noexcept;
  StoredRun& operator=(StoredRun&&) = delete;
  ~StoredRun();

  const std::vector<std::string>& keys() const { return keys_; }
  uint64_t tokens() const { return tokens_; }

 private:
  explicit StoredRun(client::Remote* remote) : remote_(remote) {}

  client::Remote* remote_;
  std::vector<std::string> keys_;
  uint64_t tokens_ = 0;
  uint64_t lease_id_ = 0;
};

}  // namespace kvshrink::cli
