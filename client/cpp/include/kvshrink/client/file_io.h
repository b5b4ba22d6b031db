// Files as the client reads and writes them: mapped for reading, replaced in one step when written.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvshrink::client {

// A regular file mapped read-only. Views of bytes() live as long as this object, wherever it is
// moved to. A file that another process shortens meanwhile raises SIGBUS on access, as with every
// mapping.
class MappedFile {
 public:
  // Errors: NOT_FOUND, PERMISSION_DENIED, ... from the system; INVALID_ARGUMENT when it is no
  // regular file.
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::string_view bytes() const { return {data_, size_}; }

 private:
  void Unmap();

  char* data_ = nullptr;
  size_t size_ = 0;
};

// Writes beside `path` and takes its place on Commit; a reader sees the old file or the new one,
// never a part, also after a crash. Without Commit nothing is left behind.
class AtomicFile {
 public:
  // INVALID_ARGUMENT when `path` is there and no regular file.
  static absl::StatusOr<AtomicFile> Create(const std::string& path);
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&& other) noexcept;
  ~AtomicFile();

  // Any order; parts never written are zero.
  absl::Status WriteAt(uint64_t offset, std::string_view bytes);
  // Synced to the disk when it returns.
  absl::Status Commit();

 private:
  AtomicFile(std::string path, std::string temporary, int descriptor);
  void Discard();

  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
};

}  // namespace kvshrink::client
