#include "kvshrink/client/file_io.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <utility>

#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

constexpr int kMaxNameAttempts = 100;  // names left behind by a process that had our id

absl::Status SystemError(std::string_view action, const std::string& path) {
  return absl::ErrnoToStatus(errno, StrCat("cannot ", action, " '", path, "'"));
}

std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) {
    return ".";
  }
  return slash == 0 ? "/" : path.substr(0, slash);
}

absl::Status SyncDirectory(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) {
    return SystemError("open directory", path);
  }
  const int result = fsync(descriptor);
  const int error = errno;
  close(descriptor);
  errno = error;
  // Some file systems can't sync a directory; the rename is then as durable as they make it.
  if (result != 0 && errno != EINVAL && errno != ENOTSUP) {
    return SystemError("sync directory", path);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) {
    return SystemError("open", path);
  }
  struct stat info {};
  if (fstat(descriptor, &info) != 0) {
    const absl::Status status = SystemError("examine", path);
    close(descriptor);
    return status;
  }
  if (!S_ISREG(info.st_mode)) {
    close(descriptor);
    return BadArgument("path", path, "must be a regular file");
  }
  MappedFile file;
  if (info.st_size > 0) {
    const auto size = static_cast<size_t>(info.st_size);
    void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (data == MAP_FAILED) {
      const absl::Status status = SystemError("map", path);
      close(descriptor);
      return status;
    }
    file.data_ = static_cast<char*>(data);
    file.size_ = size;
  }
  close(descriptor);
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    Unmap();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

MappedFile::~MappedFile() { Unmap(); }

void MappedFile::Unmap() {
  if (data_ != nullptr) {
    munmap(data_, size_);
  }
}

absl::StatusOr<AtomicFile> AtomicFile::Create(const std::string& path) {
  struct stat info {};
  const bool exists = stat(path.c_str(), &info) == 0;
  // A rename over a device or a pipe would replace it.
  if (exists && !S_ISREG(info.st_mode)) {
    return BadArgument("path", path, "must be a regular file or not exist");
  }
  // A name of our own rather than mkostemp's, whose mode of 0600 ignores the umask.
  static std::atomic<uint64_t> counter{0};
  std::string temporary;
  int descriptor = -1;
  for (int attempt = 0; attempt < kMaxNameAttempts && descriptor < 0; ++attempt) {
    temporary = StrCat(path, ".tmp-", getpid(), "-", counter.fetch_add(1));
    descriptor = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0 && errno != EEXIST) {
      break;
    }
  }
  if (descriptor < 0) {
    return SystemError("create", temporary);
  }
  AtomicFile file(path, std::move(temporary), descriptor);
  if (exists && fchmod(descriptor, info.st_mode & 07777) != 0) {
    return SystemError("set the mode of", file.temporary_);
  }
  return file;
}

AtomicFile::AtomicFile(std::string path, std::string temporary, int descriptor)
    : path_(std::move(path)), temporary_(std::move(temporary)), descriptor_(descriptor) {}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

AtomicFile& AtomicFile::operator=(AtomicFile&& other) noexcept {
  if (this != &other) {
    Discard();
    path_ = std::move(other.path_);
    temporary_ = std::move(other.temporary_);
    descriptor_ = std::exchange(other.descriptor_, -1);
  }
  return *this;
}

AtomicFile::~AtomicFile() { Discard(); }

void AtomicFile::Discard() {
  if (descriptor_ >= 0) {
    close(std::exchange(descriptor_, -1));
    unlink(temporary_.c_str());
  }
}

absl::Status AtomicFile::WriteAt(uint64_t offset, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written =
        pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) {
        continue;
      }
      return SystemError("write", temporary_);
    }
    bytes.remove_prefix(static_cast<size_t>(written));
    offset += static_cast<uint64_t>(written);
  }
  return absl::OkStatus();
}

absl::Status AtomicFile::Commit() {
  if (fsync(descriptor_) != 0) {
    return SystemError("sync", temporary_);
  }
  if (rename(temporary_.c_str(), path_.c_str()) != 0) {
    return SystemError("rename to", path_);
  }
  close(std::exchange(descriptor_, -1));
  return SyncDirectory(DirectoryOf(path_));
}

}  // namespace kvshrink::client
