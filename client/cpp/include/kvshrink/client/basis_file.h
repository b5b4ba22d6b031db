// Calibrated bases in files.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvshrink/basis.h"
#include "kvshrink/client/safetensors.h"

namespace kvshrink::client {

// Maps and checks a .kvb file, its metadata too. Errors: those of MappedFile, DATA_LOSS naming file
// and field.
absl::StatusOr<std::shared_ptr<const Basis>> OpenBasis(const std::string& path);

// The metadata as a JSON object of strings. Errors: DATA_LOSS naming the field.
absl::StatusOr<Metadata> BasisMetadata(const Basis& basis);

}  // namespace kvshrink::client
