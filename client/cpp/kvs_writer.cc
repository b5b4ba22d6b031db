#include <algorithm>
#include <functional>
#include <utility>

#include "kvs_layout.h"
#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/status.h"
#include "nlohmann/json.hpp"

namespace kvshrink::client {
namespace {

absl::Status CheckContents(const KvsWriter::Contents& contents) {
  if (contents.chunks < 1 || contents.chunks > kMaxKvsChunks) {
    return BadArgument("chunks", contents.chunks, StrCat("must be 1..", kMaxKvsChunks));
  }
  const size_t layers = contents.layers.size();
  if (layers < 1 || layers > kMaxKvsLayers || layers * contents.chunks > kMaxKvsShards) {
    return BadArgument("layers", layers,
                       StrCat("must be 1..", kMaxKvsLayers, ", and at most ", kMaxKvsShards,
                              " with all ", contents.chunks, " chunks"));
  }
  const auto unordered = std::adjacent_find(contents.layers.begin(), contents.layers.end(),
                                            std::greater_equal<uint32_t>());
  if (unordered != contents.layers.end()) {
    return BadArgument("layer", *(unordered + 1), StrCat("must be above ", *unordered));
  }
  if (contents.layers.back() > kMaxLayer) {
    return BadArgument("layer", contents.layers.back(), StrCat("must be 0..", kMaxLayer));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> MetadataText(const Metadata& metadata) {
  std::string text;
  try {
    text = nlohmann::json(metadata).dump();
  } catch (const nlohmann::json::exception& error) {
    return BadArgument("metadata", "no UTF-8", error.what());
  }
  if (metadata.empty()) {
    text = "{}";
  }
  if (text.size() > kMaxKvsMetadataBytes) {
    return BadArgument("metadata_bytes", text.size(),
                       StrCat("must be at most ", kMaxKvsMetadataBytes));
  }
  return text;
}

}  // namespace

absl::StatusOr<KvsWriter> KvsWriter::Create(const std::string& path, Contents contents) {
  KVSHRINK_RETURN_IF_ERROR(CheckContents(contents));
  KVSHRINK_ASSIGN_OR_RETURN(std::string metadata, MetadataText(contents.metadata));
  KVSHRINK_ASSIGN_OR_RETURN(AtomicFile file, AtomicFile::Create(path));
  return KvsWriter(std::move(file), std::move(contents), std::move(metadata));
}

KvsWriter::KvsWriter(AtomicFile file, Contents contents, std::string metadata)
    : file_(std::move(file)),
      contents_(std::move(contents)),
      metadata_(std::move(metadata)),
      agreement_(contents_.layers),
      position_bytes_(kKvsHeaderBytes +
                      kKvsEntryBytes * contents_.layers.size() * contents_.chunks +
                      metadata_.size()) {}

absl::Status KvsWriter::Append(std::string_view shard) {
  const size_t layers = contents_.layers.size();
  const size_t number = entries_.size();
  if (number == layers * contents_.chunks) {
    return absl::OutOfRangeError(StrCat("the file has all its ", number, " shards"));
  }
  KVSHRINK_ASSIGN_OR_RETURN(
      const Shard parsed,
      Shard::Parse(shard, contents_.previews ? Extent::kAllowPreview : Extent::kWhole));
  KVSHRINK_RETURN_IF_ERROR(agreement_.Add(parsed.header()));
  KVSHRINK_RETURN_IF_ERROR(file_.WriteAt(position_bytes_, shard));
  entries_.push_back({static_cast<uint32_t>(number / layers), contents_.layers[number % layers],
                      position_bytes_, shard.size(), KvsChecksum(shard)});
  position_bytes_ += shard.size();
  return absl::OkStatus();
}

absl::Status KvsWriter::Finish() {
  const size_t expected = contents_.layers.size() * contents_.chunks;
  if (entries_.size() != expected) {
    return absl::FailedPreconditionError(
        StrCat("the file has ", entries_.size(), " of its ", expected, " shards"));
  }
  std::string directory;
  directory.reserve(entries_.size() * kKvsEntryBytes);
  for (const KvsEntry& entry : entries_) {
    AppendKvsEntry(entry, &directory);
  }
  KvsHeader header;
  header.flags = contents_.previews ? kKvsFlagPreviews : 0;
  header.chunks = contents_.chunks;
  header.layers = static_cast<uint32_t>(contents_.layers.size());
  header.metadata_bytes = static_cast<uint32_t>(metadata_.size());
  header.directory_checksum = KvsChecksum(directory);
  header.metadata_checksum = KvsChecksum(metadata_);
  KVSHRINK_RETURN_IF_ERROR(file_.WriteAt(0, PackKvsHeader(header)));
  KVSHRINK_RETURN_IF_ERROR(file_.WriteAt(kKvsHeaderBytes, directory));
  KVSHRINK_RETURN_IF_ERROR(file_.WriteAt(kKvsHeaderBytes + directory.size(), metadata_));
  return file_.Commit();
}

}  // namespace kvshrink::client
