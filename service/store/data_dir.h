// The daemon's data directory: made, checked and held by one process.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvshrink::store {

// Holds the directory while it lives; the system lets go of it when the process dies.
class DataDir {
 public:
  // Makes the directory (for its owner alone) where absent. FAILED_PRECONDITION when another
  // process, or this one, holds it; INVALID_ARGUMENT when it can't be made or written.
  static absl::StatusOr<DataDir> Hold(const std::string& path);
  DataDir(DataDir&& other) noexcept;
  DataDir& operator=(DataDir&&) = delete;
  ~DataDir();

  // Where RocksDB's files are.
  std::string database_path() const { return path_ + "/store"; }

 private:
  DataDir(std::string path, int lock_fd) : path_(std::move(path)), lock_fd_(lock_fd) {}

  std::string path_;
  int lock_fd_;
};

// Whether there is a database to open at `path`. DATA_LOSS when there is a part of one: RocksDB
// would take it for none and begin anew.
absl::StatusOr<bool> DatabaseExists(const std::string& path);

}  // namespace kvshrink::store
