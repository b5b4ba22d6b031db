// .kvs files: the shards of a whole run of tokens (proto/FORMAT.md section 8). A bare shard is read
// as a file of one.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/client/file_io.h"
#include "kvshrink/client/safetensors.h"
#include "kvshrink/shard.h"

namespace kvshrink::client {

inline constexpr uint32_t kMaxKvsChunks = 65536;
inline constexpr uint32_t kMaxKvsLayers = 4096;
inline constexpr uint32_t kMaxKvsShards = uint32_t{1} << 20;
inline constexpr uint32_t kMaxKvsMetadataBytes = uint32_t{1} << 20;

// Where a shard lies.
struct KvsEntry {
  uint32_t chunk = 0;
  uint32_t layer = 0;
  uint64_t offset_bytes = 0;
  uint64_t length_bytes = 0;
  uint64_t checksum = 0;
};

// What the shards of a file must agree on, shown to it in file order: layers with the directory,
// positions within and between chunks, dtype, sizes and V (or none) within a layer.
class KvsAgreement {
 public:
  explicit KvsAgreement(std::vector<uint32_t> layers);

  // Errors: DATA_LOSS naming the field.
  absl::Status Add(const ShardHeader& header);

 private:
  std::vector<uint32_t> layers_;
  std::vector<ShardHeader> first_chunk_;  // by place of the layer
  size_t place_ = 0;                      // of the next shard
  ShardHeader chunk_;                     // first shard of the chunk that is being read
  std::optional<uint64_t> end_token_;     // of the chunk before
};

class KvsFile {
 public:
  // Maps the file; shards are checked when they are read. Errors: those of MappedFile, DATA_LOSS
  // naming the field.
  static absl::StatusOr<KvsFile> Open(const std::string& path);
  // A view of bytes that outlive the file.
  static absl::StatusOr<KvsFile> Parse(std::string_view bytes);

  bool bare_shard() const { return bare_shard_; }
  bool previews() const { return previews_; }  // shards may lack all but their low-rank part
  uint32_t chunks() const { return chunks_; }
  const std::vector<uint32_t>& layers() const { return layers_; }  // ascending
  const Metadata& metadata() const { return metadata_; }
  const std::vector<KvsEntry>& entries() const { return entries_; }  // by chunk, then layer
  uint64_t bytes() const { return bytes_.size(); }

  // Shard `number`, after its checksum and the checks of its own; a view. Errors: DATA_LOSS naming
  // the field.
  absl::StatusOr<Shard> ReadShard(size_t number) const;

  // All shards in order, each checked against those before; stops at the first error, of a shard or
  // of `visit`.
  using Visit = std::function<absl::Status(const KvsEntry& entry, const Shard& shard)>;
  absl::Status ForEachShard(const Visit& visit) const;

 private:
  absl::Status ReadHeader();
  absl::Status ReadDirectory();
  absl::Status ReadMetadata();
  absl::Status ReadBareShard();

  MappedFile file_;
  std::string_view bytes_;
  bool bare_shard_ = false;
  bool previews_ = false;
  uint32_t chunks_ = 0;
  std::vector<uint32_t> layers_;
  Metadata metadata_;
  std::vector<KvsEntry> entries_;
};

// Writes a file shard by shard; what it writes, KvsFile reads.
class KvsWriter {
 public:
  struct Contents {
    uint32_t chunks = 0;
    std::vector<uint32_t> layers;  // ascending
    Metadata metadata;
    bool previews = false;
  };

  // Errors: INVALID_ARGUMENT naming the field, system errors.
  static absl::StatusOr<KvsWriter> Create(const std::string& path, Contents contents);

  // The next shard, by chunk, then layer. Errors: DATA_LOSS when it isn't a shard or doesn't fit
  // those before, OUT_OF_RANGE beyond the last.
  absl::Status Append(std::string_view shard);
  // Makes the file visible. FAILED_PRECONDITION while shards are missing.
  absl::Status Finish();

  uint64_t bytes() const {
    return position_bytes_;
  }  // written so far, header and directory included

 private:
  KvsWriter(AtomicFile file, Contents contents, std::string metadata);

  AtomicFile file_;
  Contents contents_;
  std::string metadata_;
  KvsAgreement agreement_;
  std::vector<KvsEntry> entries_;
  uint64_t position_bytes_ = 0;
};

}  // namespace kvshrink::client
