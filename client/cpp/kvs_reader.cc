#include <utility>

#include "absl/strings/str_format.h"
#include "kvs_layout.h"
#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/status.h"
#include "strict_json.h"

namespace kvshrink::client {
namespace {

template <typename Value>
absl::Status BadFile(std::string_view field, const Value& value, std::string_view rule) {
  return absl::DataLossError(StrCat("kvs field '", field, "' is ", value, ": ", rule));
}

absl::Status CheckChecksum(std::string_view field, uint64_t stored, std::string_view bytes) {
  const uint64_t actual = KvsChecksum(bytes);
  if (actual != stored) {
    return BadFile(field, absl::StrFormat("%016x", stored),
                   absl::StrFormat("the bytes give %016x", actual));
  }
  return absl::OkStatus();
}

std::string DirectoryField(size_t number, std::string_view field) {
  return StrCat("directory[", number, "].", field);
}

absl::Status CheckHeader(const KvsHeader& header) {
  if ((header.flags & ~kKvsFlagPreviews) != 0) {
    return BadFile("flags", header.flags, "only bit 0 may be set");
  }
  if (header.chunks < 1 || header.chunks > kMaxKvsChunks) {
    return BadFile("chunks", header.chunks, StrCat("must be 1..", kMaxKvsChunks));
  }
  if (header.layers < 1 || header.layers > kMaxKvsLayers) {
    return BadFile("layers", header.layers, StrCat("must be 1..", kMaxKvsLayers));
  }
  if (uint64_t{header.chunks} * header.layers > kMaxKvsShards) {
    return BadFile("layers", header.layers,
                   StrCat("times ", header.chunks, " chunks must be at most ", kMaxKvsShards));
  }
  if (header.metadata_bytes < 2 || header.metadata_bytes > kMaxKvsMetadataBytes) {
    return BadFile("metadata_bytes", header.metadata_bytes,
                   StrCat("must be 2..", kMaxKvsMetadataBytes));
  }
  if (header.reserved != 0) {
    return BadFile("reserved", header.reserved, "must be 0");
  }
  return absl::OkStatus();
}

// Entry `number` against those before it; `at` is where it must start.
absl::Status CheckEntry(const std::vector<KvsEntry>& before, const KvsEntry& entry, uint32_t layers,
                        uint64_t at, uint64_t file_bytes) {
  const size_t number = before.size();
  const size_t place = number % layers;
  if (entry.chunk != number / layers) {
    return BadFile(DirectoryField(number, "chunk"), entry.chunk,
                   StrCat("must be ", number / layers));
  }
  if (entry.layer > kMaxLayer) {
    return BadFile(DirectoryField(number, "layer"), entry.layer, StrCat("must be 0..", kMaxLayer));
  }
  if (number >= layers && entry.layer != before[place].layer) {
    return BadFile(DirectoryField(number, "layer"), entry.layer,
                   StrCat("must be ", before[place].layer, " as in the first chunk"));
  }
  if (place > 0 && entry.layer <= before.back().layer) {
    return BadFile(DirectoryField(number, "layer"), entry.layer,
                   StrCat("must be above ", before.back().layer));
  }
  if (entry.offset_bytes != at) {
    return BadFile(DirectoryField(number, "offset"), entry.offset_bytes, StrCat("must be ", at));
  }
  if (entry.length_bytes < kMinShardBytes || entry.length_bytes > file_bytes - at) {
    return BadFile(DirectoryField(number, "length"), entry.length_bytes,
                   StrCat("must be at least ", kMinShardBytes, " and within the file's ",
                          file_bytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<KvsFile> KvsFile::Open(const std::string& path) {
  KVSHRINK_ASSIGN_OR_RETURN(MappedFile mapped, MappedFile::Open(path));
  auto file = Parse(mapped.bytes());
  if (!file.ok()) {
    return InContext(path, file.status());
  }
  file->file_ = std::move(mapped);
  return file;
}

absl::StatusOr<KvsFile> KvsFile::Parse(std::string_view bytes) {
  KvsFile file;
  file.bytes_ = bytes;
  if (bytes.substr(0, kShardMagic.size()) == kShardMagic) {
    KVSHRINK_RETURN_IF_ERROR(file.ReadBareShard());
    return file;
  }
  KVSHRINK_RETURN_IF_ERROR(file.ReadHeader());
  KVSHRINK_RETURN_IF_ERROR(file.ReadDirectory());
  KVSHRINK_RETURN_IF_ERROR(file.ReadMetadata());
  return file;
}

absl::Status KvsFile::ReadBareShard() {
  KVSHRINK_ASSIGN_OR_RETURN(const Shard shard, Shard::Parse(bytes_));
  bare_shard_ = true;
  chunks_ = 1;
  layers_ = {shard.header().layer};
  entries_ = {{0, shard.header().layer, 0, bytes_.size(), KvsChecksum(bytes_)}};
  return absl::OkStatus();
}

absl::Status KvsFile::ReadHeader() {
  if (bytes_.size() < kKvsHeaderBytes) {
    return BadFile("size", bytes_.size(), StrCat("a header has ", kKvsHeaderBytes, " bytes"));
  }
  if (bytes_.substr(0, kKvsMagic.size()) != kKvsMagic) {
    return BadFile("magic", absl::StrFormat("%08x", UnpackKvsEntry(bytes_).chunk),
                   "must be that of a .kvs file or of a shard");
  }
  const KvsHeader header = UnpackKvsHeader(bytes_);
  if (header.version != kKvsVersion) {
    return BadFile("version", header.version, StrCat("must be ", kKvsVersion));
  }
  KVSHRINK_RETURN_IF_ERROR(CheckChecksum("header_checksum", header.header_checksum,
                                         bytes_.substr(0, kKvsCheckedHeaderBytes)));
  KVSHRINK_RETURN_IF_ERROR(CheckHeader(header));
  const uint64_t directory_bytes = uint64_t{header.chunks} * header.layers * kKvsEntryBytes;
  const uint64_t needed = kKvsHeaderBytes + directory_bytes + header.metadata_bytes;
  if (bytes_.size() < needed) {
    return BadFile("size", bytes_.size(),
                   StrCat("header, directory and metadata are ", needed, " bytes"));
  }
  KVSHRINK_RETURN_IF_ERROR(CheckChecksum("directory_checksum", header.directory_checksum,
                                         bytes_.substr(kKvsHeaderBytes, directory_bytes)));
  KVSHRINK_RETURN_IF_ERROR(
      CheckChecksum("metadata_checksum", header.metadata_checksum,
                    bytes_.substr(kKvsHeaderBytes + directory_bytes, header.metadata_bytes)));
  previews_ = (header.flags & kKvsFlagPreviews) != 0;
  chunks_ = header.chunks;
  return absl::OkStatus();
}

absl::Status KvsFile::ReadDirectory() {
  const KvsHeader header = UnpackKvsHeader(bytes_);
  const size_t count = size_t{header.chunks} * header.layers;
  uint64_t at = kKvsHeaderBytes + count * kKvsEntryBytes + header.metadata_bytes;
  entries_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const KvsEntry entry =
        UnpackKvsEntry(bytes_.substr(kKvsHeaderBytes + i * kKvsEntryBytes, kKvsEntryBytes));
    KVSHRINK_RETURN_IF_ERROR(CheckEntry(entries_, entry, header.layers, at, bytes_.size()));
    at += entry.length_bytes;
    entries_.push_back(entry);
  }
  if (at != bytes_.size()) {
    return BadFile(DirectoryField(count - 1, "length"), entries_.back().length_bytes,
                   StrCat("the last shard must end with the file, at ", bytes_.size()));
  }
  for (uint32_t i = 0; i < header.layers; ++i) {
    layers_.push_back(entries_[i].layer);
  }
  return absl::OkStatus();
}

absl::Status KvsFile::ReadMetadata() {
  const KvsHeader header = UnpackKvsHeader(bytes_);
  const std::string_view text =
      bytes_.substr(kKvsHeaderBytes + entries_.size() * kKvsEntryBytes, header.metadata_bytes);
  KVSHRINK_ASSIGN_OR_RETURN(const nlohmann::json json, ParseStrictJson(text, "metadata", 1));
  KVSHRINK_ASSIGN_OR_RETURN(metadata_, MetadataFromJson(json, "metadata"));
  return absl::OkStatus();
}

absl::StatusOr<Shard> KvsFile::ReadShard(size_t number) const {
  const KvsEntry& entry = entries_[number];
  const std::string_view bytes = bytes_.substr(entry.offset_bytes, entry.length_bytes);
  if (!bare_shard_) {
    KVSHRINK_RETURN_IF_ERROR(
        CheckChecksum(DirectoryField(number, "checksum"), entry.checksum, bytes));
  }
  auto shard = Shard::Parse(bytes, previews_ ? Extent::kAllowPreview : Extent::kWhole);
  if (!shard.ok()) {
    return InContext(StrCat("chunk ", entry.chunk, ", layer ", entry.layer), shard.status());
  }
  return shard;
}

absl::Status KvsFile::ForEachShard(const Visit& visit) const {
  KvsAgreement agreement(layers_);
  for (size_t i = 0; i < entries_.size(); ++i) {
    KVSHRINK_ASSIGN_OR_RETURN(const Shard shard, ReadShard(i));
    absl::Status status = agreement.Add(shard.header());
    if (status.ok()) {
      status = visit(entries_[i], shard);
    }
    if (!status.ok()) {
      return InContext(StrCat("chunk ", entries_[i].chunk, ", layer ", entries_[i].layer), status);
    }
  }
  return absl::OkStatus();
}

}  // namespace kvshrink::client
