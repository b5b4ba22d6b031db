#include "data_dir.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "errors.h"

namespace kvshrink::store {
namespace fs = std::filesystem;

absl::StatusOr<DataDir> DataDir::Hold(const std::string& path) {
  std::error_code error;
  if (fs::create_directories(path, error)) {
    fs::permissions(path, fs::perms::owner_all, error);  // the cache is as private as the prompts
  }
  if (error) return BadField("data_dir", path, error.message());
  const std::string lock_path = path + "/LOCK";
  const int fd = open(lock_path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) return BadField("data_dir", path, std::strerror(errno));
  if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int reason = errno;
    close(fd);
    if (reason != EWOULDBLOCK) return BadField("data_dir", path, std::strerror(reason));
    return absl::FailedPreconditionError(
        absl::StrCat("field 'data_dir' is ", path, ": another process holds it"));
  }
  return DataDir(path, fd);
}

DataDir::DataDir(DataDir&& other) noexcept
    : path_(std::move(other.path_)), lock_fd_(std::exchange(other.lock_fd_, -1)) {}

DataDir::~DataDir() {
  if (lock_fd_ >= 0) close(lock_fd_);
}

absl::StatusOr<bool> DatabaseExists(const std::string& path) {
  std::error_code error;
  if (fs::exists(path + "/CURRENT", error)) return true;
  for (fs::directory_iterator file(path, error), end; !error && file != end;
       file.increment(error)) {
    const std::string kind = file->path().extension().string();
    if (kind == ".sst" || kind == ".blob") {
      return BadStored("CURRENT", "absent", absl::StrCat("must be beside the files of ", path));
    }
  }
  return false;
}

}  // namespace kvshrink::store
