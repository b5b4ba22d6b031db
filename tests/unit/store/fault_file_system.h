// A file system that fails, stalls and forgets as disks do, under RocksDB.
#pragma once

#include <rocksdb/env.h>
#include <rocksdb/file_system.h>

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace kvshrink::store {

// Thread-safe.
class FaultFileSystem : public rocksdb::FileSystemWrapper {
 public:
  FaultFileSystem() : FileSystemWrapper(FileSystem::Default()) {}
  const char* Name() const override { return "FaultFileSystem"; }

  // From now on syncs of the log wait until Resume.
  void StallSyncs() {
    const std::lock_guard lock(mu_);
    stalled_ = true;
  }
  void Resume() {
    const std::lock_guard lock(mu_);
    stalled_ = false;
    stalled_reads_ = false;
    changed_.notify_all();
  }
  // From now on reads of blob files wait until Resume.
  void StallReads() {
    const std::lock_guard lock(mu_);
    stalled_reads_ = true;
  }
  // Returns when a read stands still.
  void AwaitStalledRead() {
    std::unique_lock lock(mu_);
    changed_.wait(lock, [&] { return waiting_reads_ > 0; });
  }
  // Returns when a sync stands still.
  void AwaitStalledSync() {
    std::unique_lock lock(mu_);
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }
  // From now on syncs of the log fail.
  void FailSyncs() {
    const std::lock_guard lock(mu_);
    failing_ = true;
  }

  // Whether reads of blob files fail.
  void FailReads(bool fail) {
    const std::lock_guard lock(mu_);
    failing_reads_ = fail;
  }

  // Copies a directory tree as a power cut would leave it: of files written here only what was
  // synced. Files of which nothing is known are copied whole.
  void CopySynced(const std::string& from, const std::string& to) {
    namespace fs = std::filesystem;
    const std::lock_guard lock(mu_);
    fs::copy(from, to, fs::copy_options::recursive);
    for (const auto& [path, bytes] : synced_bytes_) {
      if (!path.starts_with(from)) continue;
      const std::string copy = to + path.substr(from.size());
      if (fs::exists(copy) && fs::file_size(copy) > bytes) fs::resize_file(copy, bytes);
    }
  }

  rocksdb::IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                                    std::unique_ptr<rocksdb::FSWritableFile>* file,
                                    rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus NewRandomAccessFile(const std::string& path,
                                        const rocksdb::FileOptions& options,
                                        std::unique_ptr<rocksdb::FSRandomAccessFile>* file,
                                        rocksdb::IODebugContext* debug) override;
  rocksdb::IOStatus RenameFile(const std::string& from, const std::string& to,
                               const rocksdb::IOOptions& options,
                               rocksdb::IODebugContext* debug) override;

 private:
  class File;
  class BlobReader;

  // Called before a sync; what it returns is the sync's result when not OK.
  rocksdb::IOStatus BeforeSync(const std::string& path) {
    std::unique_lock lock(mu_);
    if (!path.ends_with(".log")) return rocksdb::IOStatus::OK();
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !stalled_; });
    --waiting_;
    return failing_ ? rocksdb::IOStatus::IOError("no more disk") : rocksdb::IOStatus::OK();
  }
  void Synced(const std::string& path, uint64_t bytes) {
    const std::lock_guard lock(mu_);
    synced_bytes_[path] = bytes;
  }

  // Called before a read; whether it fails.
  bool ReadFails() {
    std::unique_lock lock(mu_);
    ++waiting_reads_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !stalled_reads_; });
    --waiting_reads_;
    return failing_reads_;
  }

  std::mutex mu_;
  std::condition_variable changed_;
  bool stalled_ = false;
  bool failing_ = false;
  bool failing_reads_ = false;
  int waiting_ = 0;
  bool stalled_reads_ = false;
  int waiting_reads_ = 0;
  std::map<std::string, uint64_t> synced_bytes_;
};

class FaultFileSystem::File : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  File(std::unique_ptr<rocksdb::FSWritableFile> file, std::string path, FaultFileSystem* system)
      : FSWritableFileOwnerWrapper(std::move(file)), path_(std::move(path)), system_(system) {}

  rocksdb::IOStatus Sync(const rocksdb::IOOptions& options,
                         rocksdb::IODebugContext* debug) override {
    const uint64_t bytes = GetFileSize(options, debug);
    rocksdb::IOStatus status = system_->BeforeSync(path_);
    if (status.ok()) status = FSWritableFileOwnerWrapper::Sync(options, debug);
    if (status.ok()) system_->Synced(path_, bytes);
    return status;
  }
  rocksdb::IOStatus Fsync(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* debug) override {
    return Sync(options, debug);
  }

 private:
  const std::string path_;
  FaultFileSystem* const system_;
};

class FaultFileSystem::BlobReader : public rocksdb::FSRandomAccessFileOwnerWrapper {
 public:
  BlobReader(std::unique_ptr<rocksdb::FSRandomAccessFile> file, FaultFileSystem* system)
      : FSRandomAccessFileOwnerWrapper(std::move(file)), system_(system) {}

  rocksdb::IOStatus Read(uint64_t offset, size_t size, const rocksdb::IOOptions& options,
                         rocksdb::Slice* result, char* scratch,
                         rocksdb::IODebugContext* debug) const override {
    if (system_->ReadFails()) return rocksdb::IOStatus::IOError("the disk doesn't answer");
    return FSRandomAccessFileOwnerWrapper::Read(offset, size, options, result, scratch, debug);
  }

 private:
  FaultFileSystem* const system_;
};

inline rocksdb::IOStatus FaultFileSystem::NewRandomAccessFile(
    const std::string& path, const rocksdb::FileOptions& options,
    std::unique_ptr<rocksdb::FSRandomAccessFile>* file, rocksdb::IODebugContext* debug) {
  rocksdb::IOStatus status = FileSystemWrapper::NewRandomAccessFile(path, options, file, debug);
  if (!status.ok() || !path.ends_with(".blob")) return status;
  *file = std::make_unique<BlobReader>(std::move(*file), this);
  return status;
}

inline rocksdb::IOStatus FaultFileSystem::NewWritableFile(
    const std::string& path, const rocksdb::FileOptions& options,
    std::unique_ptr<rocksdb::FSWritableFile>* file, rocksdb::IODebugContext* debug) {
  rocksdb::IOStatus status = FileSystemWrapper::NewWritableFile(path, options, file, debug);
  if (!status.ok()) return status;
  Synced(path, 0);
  *file = std::make_unique<File>(std::move(*file), path, this);
  return status;
}

inline rocksdb::IOStatus FaultFileSystem::RenameFile(const std::string& from, const std::string& to,
                                                     const rocksdb::IOOptions& options,
                                                     rocksdb::IODebugContext* debug) {
  rocksdb::IOStatus status = FileSystemWrapper::RenameFile(from, to, options, debug);
  const std::lock_guard lock(mu_);
  const auto found = synced_bytes_.find(from);
  if (status.ok() && found != synced_bytes_.end()) {
    synced_bytes_[to] = found->second;
    synced_bytes_.erase(from);
  }
  return status;
}

}  // namespace kvshrink::store
