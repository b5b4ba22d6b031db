#include "kvshrink/client/basis_file.h"

#include <utility>

#include "kvshrink/client/file_io.h"
#include "kvshrink/client/status.h"
#include "strict_json.h"

namespace kvshrink::client {

constexpr std::string_view kMetadataField = "basis.metadata";

absl::StatusOr<std::shared_ptr<const Basis>> OpenBasis(const std::string& path) {
  KVSHRINK_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  absl::StatusOr<Basis> basis = Basis::Parse(file.bytes());
  if (!basis.ok()) {
    return InContext(path, basis.status());
  }
  if (const auto metadata = BasisMetadata(*basis); !metadata.ok()) {
    return InContext(path, metadata.status());
  }
  return std::make_shared<const Basis>(*std::move(basis));
}

absl::StatusOr<Metadata> BasisMetadata(const Basis& basis) {
  KVSHRINK_ASSIGN_OR_RETURN(const nlohmann::json json,
                            ParseStrictJson(basis.metadata(), kMetadataField, 2));
  return MetadataFromJson(json, kMetadataField);
}

}  // namespace kvshrink::client
