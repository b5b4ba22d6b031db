#include "format/shard_writer.h"

#include <algorithm>
#include <array>

#include "format/extensions.h"
#include "format/layout.h"

namespace kvshrink::format {
namespace {

void WriteHeader(const ShardHeader& header, uint32_t ext_bytes, uint8_t* data) {
  std::copy(kMagic.begin(), kMagic.end(), data);
  StoreLittle<uint16_t>(kVersion, data + offset::kVersion);
  data[offset::kProfile] = static_cast<uint8_t>(header.profile);
  data[offset::kDType] = static_cast<uint8_t>(header.dtype);
  StoreLittle(static_cast<uint16_t>(header.shape.head_dim), data + offset::kHeadDim);
  StoreLittle(static_cast<uint16_t>(header.shape.kv_heads), data + offset::kKvHeads);
  StoreLittle<uint32_t>(header.shape.tokens, data + offset::kTokens);
  StoreLittle<uint32_t>(header.first_token, data + offset::kFirstToken);
  StoreLittle(static_cast<uint16_t>(header.layer), data + offset::kLayer);
  StoreLittle(static_cast<uint16_t>((header.keys_only ? kFlagKeysOnly : 0) |
                                    (header.padded ? kFlagPadded : 0)),
              data + offset::kFlags);
  StoreLittle<uint32_t>(header.raw_rows, data + offset::kRawRows);
  StoreLittle(ext_bytes, data + offset::kExtBytes);
}

void AppendIndexEntry(const Backend::BlockOutput& block, std::string* out) {
  std::array<uint8_t, kIndexEntryBytes> entry{};
  entry[0] = static_cast<uint8_t>(block.exponent);
  entry[1] = static_cast<uint8_t>(block.code);
  entry[2] = static_cast<uint8_t>(block.rank);
  StoreLittle(static_cast<uint16_t>(block.factors.size()), entry.data() + 4);
  out->append(entry.begin(), entry.end());
}

void Append(const std::vector<uint8_t>& bytes, std::string* out) {
  out->append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

// Ends a block's part of a section that begins at `section`.
void Pad(size_t section, std::string* out) {
  out->resize(section + PaddedBytes(out->size() - section), '\0');
}

size_t TotalBytes(std::span<const CodedBlock> blocks) {
  size_t total = kHeaderBytes;
  for (const CodedBlock& block : blocks) {
    total += kIndexEntryBytes + block.bytes();
  }
  return total;
}

}  // namespace

std::string WriteShard(const ShardHeader& header, std::span<const CodedBlock> blocks,
                       uint64_t slot_bytes) {
  const std::string extensions = WriteExtensions(header.extensions);
  std::string out;
  out.reserve(extensions.size() + TotalBytes(blocks));
  out.resize(kHeaderBytes, '\0');
  out.append(extensions);
  for (const CodedBlock& block : blocks) {
    AppendIndexEntry(block.output, &out);
  }
  const size_t low_begin = out.size();
  for (const CodedBlock& block : blocks) {
    out.append(block.raw_rows);
    Append(block.output.factors, &out);
    Pad(low_begin, &out);
  }
  const size_t scales_begin = out.size();
  for (const CodedBlock& block : blocks) {
    Append(block.output.scales, &out);
    Pad(scales_begin, &out);
  }
  const size_t codes_begin = out.size();
  for (const CodedBlock& block : blocks) {
    Append(block.output.codes, &out);
    out.append(block.raw_block);
    Pad(codes_begin, &out);
  }
  if (header.padded) {
    out.resize(std::max<size_t>(out.size(), slot_bytes), '\0');
  }

  auto* data = reinterpret_cast<uint8_t*>(out.data());
  WriteHeader(header, static_cast<uint32_t>(extensions.size()), data);
  const auto section = [&](size_t begin, size_t end, size_t checksum) {
    StoreLittle<uint64_t>(SectionChecksum(data + begin, end - begin), data + checksum);
    return static_cast<uint64_t>(end - begin);
  };
  section(kHeaderBytes, low_begin, offset::kIndexChecksum);
  StoreLittle(section(low_begin, scales_begin, offset::kLowChecksum), data + offset::kLowBytes);
  StoreLittle(section(scales_begin, codes_begin, offset::kScalesChecksum),
              data + offset::kScalesBytes);
  StoreLittle(section(codes_begin, out.size(), offset::kCodesChecksum), data + offset::kCodesBytes);
  StoreLittle<uint64_t>(HeaderChecksum(data, offset::kHeaderChecksum),
                        data + offset::kHeaderChecksum);
  return out;
}

}  // namespace kvshrink::format
