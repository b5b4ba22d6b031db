// The checks of proto/FORMAT.md section 6, in its order.
#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "format/extensions.h"
#include "format/layout.h"
#include "kvshrink/error.h"
#include "kvshrink/shard.h"
#include "kvshrink/strcat.h"
#include "stages/eoptshrink.h"
#include "stages/kvs_factors.h"

namespace kvshrink {
namespace {

using format::LoadLittle;
namespace at = format::offset;

std::string BlockField(std::string_view table, uint32_t index, std::string_view field) {
  return StrCat(table, "[", index, "].", field);
}

struct Sections {
  uint64_t extensions = 0, low = 0, scales = 0, codes = 0;
};

absl::Status CheckIntegrityOfHeader(std::string_view bytes, const uint8_t* data) {
  if (bytes.size() < format::kHeaderBytes) {
    return BadShard("size", bytes.size(), StrCat("a header has ", format::kHeaderBytes, " bytes"));
  }
  if (bytes.substr(0, 4) != format::kMagic) {
    return BadShard("magic",
                    StrCat(absl::Hex(LoadLittle<uint32_t>(data + at::kMagic), absl::kZeroPad8)),
                    "must be KVS1");
  }
  if (const auto version = LoadLittle<uint16_t>(data + at::kVersion); version != format::kVersion) {
    return BadShard("version", version, StrCat("this build reads version ", format::kVersion));
  }
  const auto stored = LoadLittle<uint64_t>(data + at::kHeaderChecksum);
  if (stored != format::HeaderChecksum(data, at::kHeaderChecksum)) {
    return BadShard("header_checksum", StrCat(absl::Hex(stored)), "doesn't match the header");
  }
  return absl::OkStatus();
}

absl::Status CheckLimit(std::string_view field, uint64_t value, uint64_t least, uint64_t most) {
  if (value < least || value > most) {
    return BadShard(field, value, StrCat("must be ", least, "..", most));
  }
  return absl::OkStatus();
}

absl::Status ReadHeader(const uint8_t* data, ShardHeader* header, Sections* sections) {
  const std::optional<Profile> profile = ProfileFromId(data[at::kProfile]);
  if (!profile.has_value()) {
    return BadShard("profile", int{data[at::kProfile]}, "unknown to this build");
  }
  header->profile = *profile;
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("dtype", data[at::kDType], 0, 3));
  header->dtype = static_cast<DType>(data[at::kDType]);
  TensorShape& shape = header->shape;
  shape.head_dim = LoadLittle<uint16_t>(data + at::kHeadDim);
  shape.kv_heads = LoadLittle<uint16_t>(data + at::kKvHeads);
  shape.tokens = LoadLittle<uint32_t>(data + at::kTokens);
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("head_dim", shape.head_dim, 1, kMaxHeadDim));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("kv_heads", shape.kv_heads, 1, kMaxKvHeads));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("tokens", shape.tokens, 1, kMaxTokens));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("entries", shape.entries(), 1, kMaxEntries));
  header->first_token = LoadLittle<uint32_t>(data + at::kFirstToken);
  KVSHRINK_RETURN_IF_ERROR(
      CheckLimit("first_token", header->first_token, 0, (uint64_t{1} << 31) - 1 - shape.tokens));
  header->layer = LoadLittle<uint16_t>(data + at::kLayer);
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("layer", header->layer, 0, kMaxLayer));
  const auto flags = LoadLittle<uint16_t>(data + at::kFlags);
  if ((flags & ~(format::kFlagKeysOnly | format::kFlagPadded)) != 0) {
    return BadShard("flags", flags, "unknown to this build");
  }
  header->keys_only = (flags & format::kFlagKeysOnly) != 0;
  header->padded = (flags & format::kFlagPadded) != 0;
  header->raw_rows = LoadLittle<uint32_t>(data + at::kRawRows);
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("raw_rows", header->raw_rows, 0, shape.tokens));
  sections->extensions = LoadLittle<uint32_t>(data + at::kExtBytes);
  KVSHRINK_RETURN_IF_ERROR(
      CheckLimit("ext_bytes", sections->extensions, 0, format::kMaxExtensionBytes));
  if (sections->extensions % format::kExtensionAlignment != 0) {
    return BadShard("ext_bytes", sections->extensions, "must be a multiple of 8");
  }
  sections->low = LoadLittle<uint64_t>(data + at::kLowBytes);
  sections->scales = LoadLittle<uint64_t>(data + at::kScalesBytes);
  sections->codes = LoadLittle<uint64_t>(data + at::kCodesBytes);
  return absl::OkStatus();
}

absl::Status ReadIndexEntry(const uint8_t* entry, uint32_t index, Family family, uint32_t d,
                            BlockView* block, uint32_t* factor_bytes) {
  block->exponent = static_cast<int8_t>(entry[0]);
  block->code = static_cast<BlockCode>(entry[1]);
  block->rank = entry[2];
  *factor_bytes = LoadLittle<uint16_t>(entry + 4);
  const bool levels =
      format::FamilyHasCode(family, block->code) && format::IsLevelCode(block->code);
  if (!format::FamilyHasCode(family, block->code) ||
      (block->coded_rows() == 0 && block->code != BlockCode::kZero)) {
    return BadShard(BlockField("index", index, "code"), int{entry[1]},
                    "not a code of this profile and block");
  }
  if (block->exponent < format::kMinExponent ||
      (block->exponent != 0 && !levels && block->code != BlockCode::kFp8)) {
    return BadShard(BlockField("index", index, "exponent"), block->exponent,
                    "must be -126..127, and 0 for blocks that are zero or raw");
  }
  const uint32_t most = levels && format::FamilyHasFactors(family)
                            ? std::min({block->rows, d, format::kMaxFormatRank})
                            : 0;
  if (block->rank > most) {
    return BadShard(BlockField("index", index, "rank"), block->rank,
                    StrCat("must be at most ", most));
  }
  if (entry[3] != 0) {
    return BadShard(BlockField("index", index, "reserved"), int{entry[3]}, "must be 0");
  }
  size_t least = 0;
  if (block->rank > 0) {
    least = family == Family::kKvs ? 2 * block->rank + 1
                                   : stages::EOptShrinkFactorBytes(block->rank, block->rows, d);
  }
  const bool exact = block->rank == 0 || family == Family::kEOptShrinkQ;
  if (*factor_bytes < least || (exact && *factor_bytes != least)) {
    return BadShard(BlockField("index", index, "factor_bytes"), *factor_bytes,
                    StrCat("must be ", exact ? "" : "at least ", least));
  }
  return absl::OkStatus();
}

absl::Status CheckKvsFactors(const BlockView& block, uint32_t index, uint32_t d) {
  std::array<stages::FactorBits, format::kMaxFormatRank> bits;
  for (uint32_t i = 0; i < block.rank; ++i) {
    const uint8_t byte = block.factors[size_t{2} * i];
    bits[i] = {byte & 15, byte >> 4};
    for (const int count : {bits[i].token, bits[i].channel}) {
      if (count < stages::kMinFactorBits || count > stages::kMaxFactorBits) {
        return BadShard(BlockField("block", index, "bits"), int{byte}, "both counts must be 2..8");
      }
    }
  }
  const size_t size = stages::KvsFactorBytes({bits.data(), block.rank}, block.rows, d);
  if (size != block.factors.size()) {
    return BadShard(BlockField("block", index, "factor_bytes"), block.factors.size(),
                    StrCat("its bit counts make ", size));
  }
  return absl::OkStatus();
}

absl::Status CheckSection(std::string_view name, uint64_t stored, uint64_t sum) {
  if (stored != sum) {
    return BadShard(StrCat(name, "_bytes"), stored, StrCat("the index makes ", sum));
  }
  return absl::OkStatus();
}

absl::Status CheckChecksum(std::string_view name, const uint8_t* data, size_t field,
                           const uint8_t* section, size_t size) {
  const auto stored = LoadLittle<uint64_t>(data + field);
  if (stored != format::SectionChecksum(section, size)) {
    return BadShard(StrCat(name, "_checksum"), StrCat(absl::Hex(stored)),
                    "doesn't match its bytes");
  }
  return absl::OkStatus();
}

// Sizes of one block's parts.
struct Parts {
  uint32_t raw = 0, factors = 0;
  size_t scales = 0, codes = 0;
};

Parts PartsOf(const ShardHeader& header, const BlockView& block, uint32_t factor_bytes) {
  const Family family = GetProfileInfo(header.profile).family;
  Parts parts;
  parts.raw =
      block.raw_rows * header.shape.head_dim * static_cast<uint32_t>(DTypeBytes(header.dtype));
  parts.factors = factor_bytes;
  parts.scales = format::ScaleBytes(family, block.code, block.coded_rows());
  parts.codes =
      format::CodeBytes(block.code, block.coded_rows(), header.shape.head_dim, header.dtype);
  return parts;
}

}  // namespace

absl::StatusOr<Shard> Shard::Parse(std::string_view bytes, Extent extent) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  KVSHRINK_RETURN_IF_ERROR(CheckIntegrityOfHeader(bytes, data));
  Shard shard;
  Sections sections;
  ShardHeader& header = shard.header_;
  KVSHRINK_RETURN_IF_ERROR(ReadHeader(data, &header, &sections));

  const size_t index_begin = format::kHeaderBytes + sections.extensions;
  const size_t low_begin = index_begin + size_t{header.blocks()} * format::kIndexEntryBytes;
  if (bytes.size() < low_begin) {
    return BadShard("size", bytes.size(), StrCat("header and index have ", low_begin, " bytes"));
  }
  KVSHRINK_RETURN_IF_ERROR(CheckChecksum("index", data, at::kIndexChecksum,
                                         data + format::kHeaderBytes,
                                         low_begin - format::kHeaderBytes));
  KVSHRINK_RETURN_IF_ERROR(format::ReadExtensions(
      {data + format::kHeaderBytes, sections.extensions}, header.shape, &header.extensions));

  if (header.extensions.basis.has_value() != NeedsBasis(header.profile)) {
    return BadShard("extension.basis",
                    header.extensions.basis ? BasisIdText(*header.extensions.basis) : "none",
                    StrCat("profile ", GetProfileInfo(header.profile).name,
                           NeedsBasis(header.profile) ? " needs one" : " has none"));
  }

  // The table's size is bounded by the index that is there.
  const Family family = GetProfileInfo(header.profile).family;
  shard.blocks_.resize(header.blocks());
  std::vector<Parts> parts(header.blocks());
  uint64_t low_sum = 0;
  uint64_t scales_sum = 0;
  uint64_t codes_sum = 0;
  for (uint32_t i = 0; i < header.blocks(); ++i) {
    BlockView& block = shard.blocks_[i];
    format::PlaceBlock(header, i, &block);
    uint32_t factor_bytes = 0;
    KVSHRINK_RETURN_IF_ERROR(ReadIndexEntry(data + index_begin + i * format::kIndexEntryBytes, i,
                                            family, header.shape.head_dim, &block, &factor_bytes));
    parts[i] = PartsOf(header, block, factor_bytes);
    low_sum += PaddedBytes(parts[i].raw + parts[i].factors);
    scales_sum += PaddedBytes(parts[i].scales);
    codes_sum += PaddedBytes(parts[i].codes);
  }
  KVSHRINK_RETURN_IF_ERROR(CheckSection("low", sections.low, low_sum));
  KVSHRINK_RETURN_IF_ERROR(CheckSection("scales", sections.scales, scales_sum));
  if (!header.padded || sections.codes < codes_sum || sections.codes > format::kMaxPaddedBytes) {
    KVSHRINK_RETURN_IF_ERROR(CheckSection("codes", sections.codes, codes_sum));
  }
  const uint64_t padding_bytes = sections.codes - codes_sum;

  const size_t scales_begin = low_begin + low_sum;
  const size_t codes_begin = scales_begin + scales_sum;
  const size_t end = codes_begin + sections.codes;
  const bool whole = bytes.size() == end;
  if (!whole && (extent == Extent::kWhole || bytes.size() < scales_begin || bytes.size() > end)) {
    return BadShard("size", bytes.size(),
                    StrCat("the shard has ", end, " bytes, its preview ", scales_begin));
  }
  KVSHRINK_RETURN_IF_ERROR(CheckChecksum("low", data, at::kLowChecksum, data + low_begin, low_sum));
  if (whole) {
    KVSHRINK_RETURN_IF_ERROR(
        CheckChecksum("scales", data, at::kScalesChecksum, data + scales_begin, scales_sum));
    KVSHRINK_RETURN_IF_ERROR(
        CheckChecksum("codes", data, at::kCodesChecksum, data + codes_begin, sections.codes));
  }

  const uint8_t* low = data + low_begin;
  const uint8_t* scales = data + scales_begin;
  const uint8_t* codes = data + codes_begin;
  for (uint32_t i = 0; i < header.blocks(); ++i) {
    BlockView& block = shard.blocks_[i];
    block.raw = {low, parts[i].raw};
    block.factors = {low + parts[i].raw, parts[i].factors};
    low += PaddedBytes(parts[i].raw + parts[i].factors);
    if (whole) {
      block.scales = {scales, parts[i].scales};
      block.codes = {codes, parts[i].codes};
      scales += PaddedBytes(parts[i].scales);
      codes += PaddedBytes(parts[i].codes);
    }
    if (family == Family::kKvs && block.rank > 0) {
      KVSHRINK_RETURN_IF_ERROR(CheckKvsFactors(block, i, header.shape.head_dim));
    }
  }
  shard.bytes_ = bytes.size();
  shard.preview_ = !whole;
  shard.preview_bytes_ = scales_begin;
  shard.shared_bytes_ = low_begin + padding_bytes;
  return shard;
}

const BlockView& Shard::block(Kind kind, uint32_t head, uint32_t index) const {
  const uint32_t row = (kind == Kind::kValue ? header_.shape.kv_heads : 0) + head;
  return blocks_[size_t{row} * header_.blocks_per_head() + index];
}

}  // namespace kvshrink
