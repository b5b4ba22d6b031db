// The safetensors format: named tensors behind a JSON header. Reading checks everything that the
// format promises; nothing is copied.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/client/file_io.h"

namespace kvshrink::client {

inline constexpr uint64_t kMaxSafetensorsHeaderBytes = uint64_t{16} << 20;
inline constexpr size_t kMaxSafetensorsDims = 8;

// String to string, as safetensors' `__metadata__`.
using Metadata = std::map<std::string, std::string, std::less<>>;

struct SafeTensor {
  std::string dtype;  // the format's own name: "F16", "BF16", ...
  std::vector<uint64_t> shape;
  std::string_view bytes;
};

// The tensors of a byte string, as views of it.
class Safetensors {
 public:
  // Errors: DATA_LOSS naming the field. As the format demands, the tensors cover the data without
  // overlap or gap.
  static absl::StatusOr<Safetensors> Parse(std::string_view bytes);

  const Metadata& metadata() const { return metadata_; }
  const std::map<std::string, SafeTensor, std::less<>>& tensors() const { return tensors_; }

 private:
  Metadata metadata_;
  std::map<std::string, SafeTensor, std::less<>> tensors_;
};

// Bytes of an element; 0 for a dtype that the format doesn't know.
uint64_t SafetensorsDtypeBytes(std::string_view dtype);

// Writes a file whose tensors are known by shape before their values: the values may come in parts
// and in any order.
class SafetensorsWriter {
 public:
  struct Tensor {
    std::string name;
    std::string dtype;
    std::vector<uint64_t> shape;
  };

  // Tensors lie in the file in the order given. Errors: INVALID_ARGUMENT (a name twice, an unknown
  // dtype, sizes that overflow), system errors.
  static absl::StatusOr<SafetensorsWriter> Create(const std::string& path, const Metadata& metadata,
                                                  std::vector<Tensor> tensors);

  // Bytes of tensor `index` from `offset` on. OUT_OF_RANGE beyond its end.
  absl::Status Write(size_t index, uint64_t offset, std::string_view bytes);
  // Makes the file visible. Refuses with FAILED_PRECONDITION while fewer bytes were written than
  // the tensors have.
  absl::Status Finish();

 private:
  struct Place {
    std::string name;
    uint64_t offset = 0;  // in the file
    uint64_t bytes = 0;
    uint64_t written_bytes = 0;
  };

  SafetensorsWriter(AtomicFile file, std::vector<Place> places);

  AtomicFile file_;
  std::vector<Place> places_;
};

}  // namespace kvshrink::client
