#include "service/engine/basis_set.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "kvshrink/error.h"
#include "kvshrink/strcat.h"

namespace kvshrink::service {

absl::StatusOr<BasisSet> BasisSet::Load(std::span<const std::string> paths) {
  BasisSet set;
  for (const std::string& path : paths) {
    std::ifstream in(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
    if (!in.is_open() || in.bad()) {
      return absl::NotFoundError(StrCat("field 'basis' is ", path, ": ", std::strerror(errno)));
    }
    absl::StatusOr<Basis> basis = Basis::Parse(bytes);
    if (!basis.ok()) {
      return absl::Status(basis.status().code(),
                          StrCat(path, ": ", std::string(basis.status().message())));
    }
    for (const Basis& other : set.bases_) {
      if (other.id() == basis->id()) {
        return BadArgument("basis", path,
                           StrCat("another file holds basis ", BasisIdText(other.id()), " too"));
      }
    }
    set.bases_.push_back(*std::move(basis));
  }
  return set;
}

const Basis* BasisSet::Of(const ShardHeader& header) const {
  for (const Basis& basis : bases_) {
    if (header.extensions.basis == basis.id()) {
      return &basis;
    }
  }
  return nullptr;
}

absl::Status BasisSet::Choose(const TensorShape& shape, EncodeOptions* options) const {
  if (!NeedsBasis(options->profile)) {
    return absl::OkStatus();
  }
  std::string reasons;
  for (const Basis& basis : bases_) {
    const absl::Status fits =
        CheckBasisFits(basis, options->layer, shape.head_dim, shape.kv_heads, options->rope);
    if (fits.ok()) {
      options->basis = &basis;
      return absl::OkStatus();
    }
    reasons += StrCat("; ", BasisIdText(basis.id()), ": ", std::string(fits.message()));
  }
  return BadArgument("encode.profile", GetProfileInfo(options->profile).name,
                     StrCat("no basis that fits is loaded: make one with `kvshrink calibrate` and "
                            "start the daemon with --basis FILE",
                            reasons));
}

}  // namespace kvshrink::service
