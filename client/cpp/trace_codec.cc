#include "kvshrink/client/trace_codec.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "kvshrink/client/status.h"

namespace kvshrink::client {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Layers and length of the run of tokens that a file holds, from the headers of its first and last
// chunk.
struct FileShape {
  uint32_t first_token = 0;
  uint32_t tokens = 0;
  std::vector<TraceWriter::Layer> layers;
};

absl::StatusOr<FileShape> ReadFileShape(const KvsFile& file, std::optional<DType> dtype) {
  FileShape result;
  const size_t layers = file.layers().size();
  KVSHRINK_ASSIGN_OR_RETURN(const Shard last, file.ReadShard(file.entries().size() - 1));
  for (size_t place = 0; place < layers; ++place) {
    KVSHRINK_ASSIGN_OR_RETURN(const Shard shard, file.ReadShard(place));
    const ShardHeader& header = shard.header();
    if (place == 0) {
      const uint64_t end = uint64_t{last.header().first_token} + last.header().shape.tokens;
      if (last.header().first_token < header.first_token) {
        return BadShard("first_token", last.header().first_token,
                        StrCat("the first chunk starts at ", header.first_token));
      }
      result.first_token = header.first_token;
      result.tokens = static_cast<uint32_t>(end - header.first_token);
    }
    TensorShape shape = header.shape;
    shape.tokens = result.tokens;
    result.layers.push_back(
        {file.layers()[place], dtype.value_or(header.dtype), shape, header.keys_only});
  }
  return result;
}

}  // namespace

uint32_t RawTokens(const CodingSettings& settings, const Trace& trace) {
  return settings.raw_tokens.value_or(trace.raw_tokens().value_or(kDefaultRawTokens));
}

const LayerRopes& RopesOf(const CodingSettings& settings, const Trace& trace) {
  return settings.ropes.has_value() ? *settings.ropes : trace.ropes();
}

bool IsRawLayer(const CodingSettings& settings, size_t place, size_t layers) {
  return place < settings.raw_layers || layers - place <= settings.raw_layers;
}

std::vector<TokenSpan> ChunksOf(uint32_t tokens, uint32_t chunk_tokens) {
  std::vector<TokenSpan> chunks;
  for (uint64_t first = 0; first < tokens; first += chunk_tokens) {
    chunks.push_back({static_cast<uint32_t>(first),
                      std::min(chunk_tokens, static_cast<uint32_t>(tokens - first))});
  }
  return chunks;
}

absl::Status EncodeTrace(const Backend& backend, const Trace& trace, const CodingSettings& settings,
                         LayerNumbers numbers,
                         const std::function<absl::Status(CodedShard)>& visit) {
  if (settings.chunk_tokens < 1 || settings.chunk_tokens > kMaxTokens) {
    return BadArgument("chunk_tokens", settings.chunk_tokens, StrCat("must be 1..", kMaxTokens));
  }
  const std::vector<TokenSpan> chunks = ChunksOf(trace.tokens(), settings.chunk_tokens);
  EncodeOptions options;
  options.raw_tokens = RawTokens(settings, trace);
  options.max_relative_error = settings.max_relative_error;
  for (uint32_t chunk = 0; chunk < chunks.size(); ++chunk) {
    options.first_token = chunks[chunk].first_token;
    for (size_t place = 0; place < trace.layers().size(); ++place) {
      const TraceLayer& layer = trace.layers()[place];
      const bool raw = IsRawLayer(settings, place, trace.layers().size());
      options.profile = raw ? Profile::kRaw : settings.profile;
      options.bits_per_entry = raw ? 0 : settings.bits_per_entry;
      options.fixed_size = settings.fixed_size && !raw;
      options.layer =
          numbers == LayerNumbers::kOfTrace ? layer.layer : static_cast<uint32_t>(place);
      const auto [first, tokens] = chunks[chunk];
      options.rope = RopesOf(settings, trace).Of(layer.layer);
      options.basis = settings.basis.get();
      CodedShard coded{chunk, place, chunks[chunk], {}, {}, 0};
      const auto start = Clock::now();
      auto bytes = EncodeShard(backend, TokenRange(layer.k, first, tokens),
                               TokenRange(layer.v, first, tokens), options, &coded.report);
      coded.seconds = SecondsSince(start);
      if (!bytes.ok()) {
        return InContext(StrCat("layer ", layer.layer, ", tokens from ", first), bytes.status());
      }
      coded.bytes = *std::move(bytes);
      KVSHRINK_RETURN_IF_ERROR(visit(std::move(coded)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<EncodedFile> EncodeFile(const Backend& backend, const Trace& trace,
                                       const CodingSettings& settings, const std::string& path,
                                       const ProgressFn& progress) {
  if (settings.chunk_tokens < 1) {
    return BadArgument("chunk_tokens", settings.chunk_tokens, "must be at least 1");
  }
  KvsWriter::Contents contents;
  contents.chunks = (trace.tokens() - 1) / settings.chunk_tokens + 1;
  contents.metadata = trace.metadata();
  contents.metadata["raw_tokens"] = StrCat(RawTokens(settings, trace));
  for (const TraceLayer& layer : trace.layers()) {
    contents.layers.push_back(layer.layer);
  }
  KVSHRINK_ASSIGN_OR_RETURN(KvsWriter writer, KvsWriter::Create(path, std::move(contents)));
  EncodedFile result;
  KVSHRINK_RETURN_IF_ERROR(EncodeTrace(backend, trace, settings, LayerNumbers::kOfTrace,
                                       [&](const CodedShard& coded) -> absl::Status {
                                         KVSHRINK_RETURN_IF_ERROR(writer.Append(coded.bytes));
                                         AddReport(coded.report, &result.report);
                                         result.seconds += coded.seconds;
                                         ++result.shards;
                                         if (progress) {
                                           progress(result.report.raw_bytes);
                                         }
                                         return absl::OkStatus();
                                       }));
  KVSHRINK_RETURN_IF_ERROR(writer.Finish());
  result.file_bytes = writer.bytes();
  return result;
}

absl::StatusOr<DecodedFile> DecodeFile(const Backend& backend, const KvsFile& file,
                                       std::optional<DType> dtype, const std::string& path,
                                       const ProgressFn& progress, const Basis* basis) {
  KVSHRINK_ASSIGN_OR_RETURN(const FileShape shape, ReadFileShape(file, dtype));
  KVSHRINK_ASSIGN_OR_RETURN(
      TraceWriter writer, TraceWriter::Create(path, WithoutQueries(file.metadata()), shape.layers));
  const DecodeForm form = file.previews() ? DecodeForm::kLowRank : DecodeForm::kFull;
  DecodedFile result;
  result.tokens = shape.tokens;
  size_t place = 0;
  KVSHRINK_RETURN_IF_ERROR(
      file.ForEachShard([&](const KvsEntry&, const Shard& shard) -> absl::Status {
        const auto start = Clock::now();
        KVSHRINK_ASSIGN_OR_RETURN(
            const std::string bytes,
            DecodeToBytes(backend, shard, form, shape.layers[place].dtype, basis));
        result.seconds += SecondsSince(start);
        KVSHRINK_RETURN_IF_ERROR(
            writer.Write(place, shard.header().first_token - shape.first_token, bytes));
        result.raw_bytes += bytes.size();
        result.entries += shard.header().entries();
        place = (place + 1) % shape.layers.size();
        if (progress) {
          progress(result.raw_bytes);
        }
        return absl::OkStatus();
      }));
  KVSHRINK_RETURN_IF_ERROR(writer.Finish());
  return result;
}

absl::StatusOr<std::string> DecodeToBytes(const Backend& backend, const Shard& shard,
                                          DecodeForm form, DType dtype, const Basis* basis) {
  const TensorShape& shape = shard.header().shape;
  const size_t half = shape.entries() * DTypeBytes(dtype);
  const bool keys_only = shard.header().keys_only;
  std::string bytes(shard.header().kinds() * half, '\0');
  auto* data = reinterpret_cast<std::byte*>(bytes.data());
  const MutableTensor k{data, dtype, shape, LayoutThd(shape)};
  const MutableTensor v{keys_only ? nullptr : data + half, dtype, shape, LayoutThd(shape)};
  KVSHRINK_RETURN_IF_ERROR(
      DecodeShard(backend, shard, form, k, keys_only ? std::nullopt : std::optional(v), basis));
  return bytes;
}

void AddReport(const ShardReport& report, ShardReport* total) {
  total->raw_bytes += report.raw_bytes;
  total->encoded_bytes += report.encoded_bytes;
  total->k.Add(report.k);
  total->v.Add(report.v);
}

}  // namespace kvshrink::client
