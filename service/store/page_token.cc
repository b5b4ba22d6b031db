#include "page_token.h"

#include "absl/strings/escaping.h"
#include "byte_code.h"
#include "chunk_record.h"
#include "disk_keys.h"
#include "errors.h"
#include "limits.h"

namespace kvshrink::store {
namespace {

// Above the length of the longest token: so much is looked at of what a peer sends.
constexpr size_t kMaxTokenBytes = 2 * (kMaxTenantBytes + kMaxNamespaceBytes + kMaxKeyBytes +
                                       3 * sizeof(uint16_t) + sizeof(uint64_t));

// Binds a token to what was asked: the checksum covers it without the token carrying it.
uint64_t Bind(std::string_view name_space, std::string_view position) {
  std::string bound = "kvshrink list 1";
  AppendBigEndian(&bound, static_cast<uint64_t>(name_space.size()));
  bound.append(name_space);
  bound.append(position);
  return Checksum(bound);
}

}  // namespace

std::string EncodePageToken(std::string_view name_space, const ChunkKey& last) {
  std::string bytes;
  AppendChunkKey(&bytes, last);
  AppendBigEndian(&bytes, Bind(name_space, bytes));
  return absl::WebSafeBase64Escape(bytes);
}

absl::StatusOr<ChunkKey> DecodePageToken(std::string_view tenant, std::string_view name_space,
                                         std::string_view token) {
  constexpr absl::string_view kRule = "must be next_page_token of the same list";
  if (token.size() > kMaxTokenBytes) {
    return BadField("page_token", absl::StrCat(token.size(), " bytes long"), kRule);
  }
  const absl::Status refused = BadField("page_token", Printable(token), kRule);
  std::string bytes;
  if (!absl::WebSafeBase64Unescape(AbslView(token), &bytes)) return refused;
  std::string_view rest = bytes;
  ChunkKey last;
  uint64_t checksum = 0;
  if (!TakeChunkKey(&rest, &last)) return refused;
  const std::string_view position(bytes.data(), bytes.size() - rest.size());
  if (!TakeBigEndian(&rest, &checksum) || !rest.empty()) return refused;
  if (checksum != Bind(name_space, position) || last.tenant != tenant) return refused;
  if (!name_space.empty() && last.name_space != name_space) return refused;
  return last;
}

}  // namespace kvshrink::store
