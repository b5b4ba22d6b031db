// Parses shards in device memory: one CTA a shard runs the checks of proto/FORMAT.md section 6 that
// make every later read safe, and writes the places of all blocks. The checksums of header and
// index are compared; those of the sections are the business of whoever brought the bytes.
#include <cuda_runtime.h>

#include "common/launch.h"
#include "common/view.h"
#include "common/xxh64.cuh"
#include "format/layout.h"
#include "stages/digits.h"
#include "stages/scales.h"

namespace kvshrink::cuda {
namespace {

namespace at = format::offset;

constexpr uint32_t kThreads = 256;
constexpr uint32_t kPadded = 2;  // flag: zero bytes follow the last block's codes
constexpr uint64_t kMaxPaddedBytes = uint64_t{1} << 31;  // of CODES then
constexpr uint32_t kMaxPieces = 1600;  // of extensions and index: (4096 + 6 * 2 * 2^17) / 1024

__device__ uint32_t Word(const uint8_t* bytes, size_t offset) {
  return *reinterpret_cast<const uint32_t*>(bytes + offset);
}

__device__ uint64_t Long(const uint8_t* bytes, size_t offset) {
  return *reinterpret_cast<const uint64_t*>(bytes + offset);
}

__device__ Family FamilyOf(uint32_t profile) {
  switch (profile) {
    case 0:
      return Family::kRaw;
    case 1:
      return Family::kFp8;
    case 2:
    case 3:
    case 4:
      return Family::kTq;
    case 5:
      return Family::kEOptShrinkQ;
    default:
      return Family::kKvs;
  }
}

// Families as bits, for the codes that each may have.
__device__ uint32_t Bit(Family family) { return 1U << static_cast<uint32_t>(family); }

__device__ bool HasCode(Family family, BlockCode code) {
  const uint32_t levels = Bit(Family::kKvs) | Bit(Family::kTq) | Bit(Family::kEOptShrinkQ);
  switch (code) {
    case BlockCode::kZero:
    case BlockCode::kRaw:
      return true;
    case BlockCode::kFp8:
      return family == Family::kFp8;
    case BlockCode::kLevels3:
    case BlockCode::kLevels5:
    case BlockCode::kLevels6:
    case BlockCode::kLevels12:
      return family == Family::kKvs;
    case BlockCode::kLevels4:
    case BlockCode::kLevels8:
    case BlockCode::kLevels16:
      return (levels & Bit(family)) != 0;
    default:
      return false;
  }
}

__device__ uint64_t Padded(uint64_t bytes) { return (bytes + 3) / 4 * 4; }

struct Header {
  uint32_t tokens, kv_heads, head_dim, raw_rows, first_token, ext_bytes, dtype, blocks_per_head;
  uint64_t low_bytes, scales_bytes, codes_bytes;
  Family family;
  bool padded;
  uint64_t index_begin, low_begin;
};

struct Parts {
  uint64_t low, scales, codes;
};

// Everything that precedes the index. One thread.
__device__ ShardField ReadHeader(const uint8_t* data, uint64_t size, const ShardBatch& batch,
                                 Header* header) {
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0) {
    return ShardField::kAddress;
  }
  if (size < format::kHeaderBytes) {
    return ShardField::kSize;
  }
  if (Word(data, at::kMagic) != 0x3153564BU) {
    return ShardField::kMagic;
  }
  if ((Word(data, at::kVersion) & 0xFFFFU) != format::kVersion) {
    return ShardField::kVersion;
  }
  const auto word = [&](uint64_t i) { return Word(data, 4 * i); };
  if (Xxh64(word, at::kHeaderChecksum) != Long(data, at::kHeaderChecksum)) {
    return ShardField::kHeaderChecksum;
  }
  const uint32_t profile = data[at::kProfile];
  header->dtype = data[at::kDType];
  header->family = FamilyOf(profile);
  header->head_dim = Word(data, at::kHeadDim) & 0xFFFFU;
  header->kv_heads = Word(data, at::kHeadDim) >> 16;
  header->tokens = Word(data, at::kTokens);
  header->first_token = Word(data, at::kFirstToken);
  header->raw_rows = Word(data, at::kRawRows);
  header->ext_bytes = Word(data, at::kExtBytes);
  if (header->kv_heads != batch.kv_heads || header->head_dim != batch.head_dim ||
      header->tokens < 1 || header->tokens > batch.max_tokens ||
      uint64_t{2} * header->tokens * header->kv_heads * header->head_dim > kMaxEntries) {
    return ShardField::kShape;
  }
  const uint32_t layer = Word(data, at::kLayer) & 0xFFFFU;
  const uint32_t flags = Word(data, at::kLayer) >> 16;
  header->padded = (flags & kPadded) != 0;
  // Of the flags the device knows one: shards without values, say, aren't for it.
  if (profile > 11 || header->dtype > 3 || layer > kMaxLayer || (flags & ~kPadded) != 0 ||
      uint64_t{header->first_token} + header->tokens > kMaxPosition ||
      header->raw_rows > header->tokens || header->ext_bytes > format::kMaxExtensionBytes ||
      header->ext_bytes % format::kExtensionAlignment != 0) {
    return ShardField::kHeader;
  }
  header->low_bytes = Long(data, at::kLowBytes);
  header->scales_bytes = Long(data, at::kScalesBytes);
  header->codes_bytes = Long(data, at::kCodesBytes);
  header->blocks_per_head = (header->tokens + kBlockTokens - 1) / kBlockTokens;
  header->index_begin = format::kHeaderBytes + header->ext_bytes;
  header->low_begin = header->index_begin + uint64_t{2} * header->kv_heads *
                                                header->blocks_per_head * format::kIndexEntryBytes;
  return size < header->low_begin ? ShardField::kSize : ShardField::kNone;
}

__device__ bool IndexChecksumHolds(const uint8_t* data, const Header& header, uint64_t* pieces) {
  const uint8_t* begin = data + format::kHeaderBytes;
  const uint64_t size = header.low_begin - format::kHeaderBytes;
  const auto count = static_cast<uint32_t>((size + kChecksumPiece - 1) / kChecksumPiece);
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
    const uint8_t* piece = begin + size_t{i} * kChecksumPiece;
    const auto word = [&](uint64_t w) { return Word(piece, 4 * w); };
    const uint64_t rest = size - uint64_t{i} * kChecksumPiece;
    pieces[i] = Xxh64(word, rest < kChecksumPiece ? rest : kChecksumPiece);
  }
  __syncthreads();
  __shared__ bool holds;
  if (threadIdx.x == 0) {
    const auto word = [&](uint64_t w) {
      return static_cast<uint32_t>(pieces[w / 2] >> (32 * (w % 2)));
    };
    holds = Xxh64(word, uint64_t{count} * 8) == Long(data, at::kIndexChecksum);
  }
  __syncthreads();
  return holds;
}

// Block number `index`: its descriptor but for the pointers, and the sizes of its parts. False when
// its entry breaks a rule.
__device__ bool ReadEntry(const uint8_t* data, const Header& header, uint32_t index,
                          BlockDesc* block, Parts* parts) {
  const uint32_t first_row = index % header.blocks_per_head * kBlockTokens;
  const uint32_t rows = min(kBlockTokens, header.tokens - first_row);
  const uint32_t raw_rows = min(rows, header.raw_rows - min(header.raw_rows, first_row));
  const uint32_t m = rows - raw_rows;
  const uint32_t d = header.head_dim;
  const uint8_t* entry = data + header.index_begin + size_t{index} * format::kIndexEntryBytes;
  const auto code = static_cast<BlockCode>(entry[1]);
  block->exponent = static_cast<int8_t>(entry[0]);
  block->code = entry[1];
  block->rank = entry[2];
  block->rows = static_cast<uint8_t>(rows);
  block->raw_rows = static_cast<uint8_t>(raw_rows);
  block->kind = static_cast<uint8_t>(static_cast<uint32_t>(header.family) | (header.dtype << 4));
  block->factor_bytes = static_cast<uint16_t>(entry[4] | (entry[5] << 8));

  const bool levels = block->has_levels();
  bool good = HasCode(header.family, code) && (m > 0 || code == BlockCode::kZero);
  good &= block->exponent >= format::kMinExponent &&
          (block->exponent == 0 || levels || code == BlockCode::kFp8);
  const bool factors =
      levels && (Bit(header.family) & (Bit(Family::kKvs) | Bit(Family::kEOptShrinkQ))) != 0;
  good &= block->rank <= (factors ? min(min(rows, d), format::kMaxFormatRank) : 0U);
  good &= entry[3] == 0;
  if (block->rank == 0) {
    good &= block->factor_bytes == 0;
  } else if (header.family == Family::kEOptShrinkQ) {
    good &= block->factor_bytes == 2U * block->rank + 64 + (4 * block->rank * (rows + d) + 7) / 8;
  } else {
    good &= block->factor_bytes >= 2U * block->rank + 1;
  }
  const uint64_t value_bytes = BytesOfDType(header.dtype);
  parts->low = Padded(uint64_t{raw_rows} * d * value_bytes + block->factor_bytes);
  parts->scales = 0;
  parts->codes = 0;
  if (levels) {
    parts->scales =
        Padded(header.family == Family::kKvs ? stages::KvsScaleBytes(m) : size_t{2} * m);
    parts->codes = Padded(stages::DigitBytes(code, size_t{m} * d));
  } else if (code != BlockCode::kZero) {
    parts->codes = Padded(uint64_t{m} * d * (code == BlockCode::kRaw ? value_bytes : 1));
  }
  return good;
}

// Sums of a value over the threads before this one; the total goes to *total.
__device__ uint64_t PrefixSum(uint64_t value, uint64_t* warps, uint64_t* total) {
  const uint32_t lane = threadIdx.x % 32;
  uint64_t sum = value;
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(0xFFFFFFFFU, sum, step);
    sum += lane >= step ? other : 0;
  }
  __syncthreads();
  if (lane == 31) {
    warps[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  uint64_t before = 0;
  *total = 0;
  for (uint32_t w = 0; w < kThreads / 32; ++w) {
    before += w < threadIdx.x / 32 ? warps[w] : 0;
    *total += warps[w];
  }
  return before + sum - value;
}

// A kvs record's bit counts are in range and make its size.
__device__ bool FactorBitsHold(const BlockDesc& block, const Header& header) {
  const uint8_t* record =
      block.low + size_t{block.raw_rows} * header.head_dim * BytesOfDType(header.dtype);
  size_t bits = 0;
  bool good = true;
  for (uint32_t i = 0; i < block.rank; ++i) {
    const uint32_t token = record[2 * i] & 15U;
    const uint32_t channel = record[2 * i] >> 4U;
    good &= token >= 2 && token <= 8 && channel >= 2 && channel <= 8;
    bits += size_t{channel} * header.head_dim + size_t{token} * block.rows;
  }
  return good && size_t{2} * block.rank + (bits + 7) / 8 == block.factor_bytes;
}

struct Shared {
  Header header;
  ShardField field;
  uint64_t warps[kThreads / 32];
  unsigned long long error;  // field << 32 | block, the least of all
  uint64_t pieces[kMaxPieces];
};

__device__ unsigned long long ErrorWord(ShardField field, uint32_t block) {
  return (static_cast<unsigned long long>(field) << 32) | block;
}

// Descriptors of all blocks, then the totals: whole, a preview, or wrong.
__device__ void PlaceBlocks(const uint8_t* data, uint64_t size, const View& view, uint32_t shard,
                            Shared* shared) {
  const Header& header = shared->header;
  const uint32_t blocks = 2 * header.kv_heads * header.blocks_per_head;
  uint64_t low = 0;
  uint64_t scales = 0;
  uint64_t codes = 0;
  for (uint32_t first = 0; first < blocks; first += kThreads) {
    const uint32_t index = first + threadIdx.x;
    BlockDesc block;
    Parts parts = {0, 0, 0};
    if (index < blocks && !ReadEntry(data, header, index, &block, &parts)) {
      atomicMin(&shared->error, ErrorWord(ShardField::kIndex, index));
    }
    Parts total;
    const uint64_t low_at = low + PrefixSum(parts.low, shared->warps, &total.low);
    const uint64_t scales_at = scales + PrefixSum(parts.scales, shared->warps, &total.scales);
    const uint64_t codes_at = codes + PrefixSum(parts.codes, shared->warps, &total.codes);
    if (index < blocks) {
      block.low = data + header.low_begin + low_at;
      block.scales = data + header.low_begin + header.low_bytes + scales_at;
      block.codes = data + header.low_begin + header.low_bytes + header.scales_bytes + codes_at;
      const uint32_t row = index / header.blocks_per_head;
      view.blocks[view.Place(shard, row / header.kv_heads, row % header.kv_heads,
                             index % header.blocks_per_head)] = block;
    }
    low += total.low;
    scales += total.scales;
    codes += total.codes;
  }
  const uint64_t low_end = header.low_begin + low;
  const uint64_t end = low_end + scales + header.codes_bytes;
  if (threadIdx.x == 0) {
    const bool padded =
        header.padded && header.codes_bytes >= codes && header.codes_bytes <= kMaxPaddedBytes;
    if (low != header.low_bytes || scales != header.scales_bytes ||
        (codes != header.codes_bytes && !padded)) {
      atomicMin(&shared->error, ErrorWord(ShardField::kSections, 0));
    } else if (size < low_end || size > end) {
      atomicMin(&shared->error, ErrorWord(ShardField::kSize, 0));
    }
  }
  __syncthreads();
}

__device__ void CheckFactors(const View& view, uint32_t shard, Shared* shared) {
  const Header& header = shared->header;
  const uint32_t blocks = 2 * header.kv_heads * header.blocks_per_head;
  for (uint32_t index = threadIdx.x; index < blocks; index += kThreads) {
    const uint32_t row = index / header.blocks_per_head;
    const BlockDesc& block = view.blocks[view.Place(
        shard, row / header.kv_heads, row % header.kv_heads, index % header.blocks_per_head)];
    if (header.family == Family::kKvs && block.rank > 0 && !FactorBitsHold(block, header)) {
      atomicMin(&shared->error, ErrorWord(ShardField::kFactorBits, index));
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    ParseKernel(ShardBatch batch, View view, uint64_t* status) {
  __shared__ Shared shared;
  const uint32_t shard = blockIdx.x;
  const auto* data = static_cast<const uint8_t*>(batch.bytes[shard]);
  const uint64_t size = batch.sizes[shard];
  constexpr unsigned long long kNoError = ~0ULL;
  if (threadIdx.x == 0) {
    shared.field = ReadHeader(data, size, batch, &shared.header);
    shared.error = shared.field == ShardField::kNone ? kNoError : ErrorWord(shared.field, 0);
  }
  // Places past the shard's blocks stay empty; so do all when a check fails.
  const size_t places = size_t{2} * view.kv_heads * view.max_blocks;
  BlockDesc* blocks = view.blocks + view.Place(shard, 0, 0, 0);
  for (size_t i = threadIdx.x; i < places; i += kThreads) {
    blocks[i] = BlockDesc{};
  }
  __syncthreads();
  bool good = shared.field == ShardField::kNone;
  if (good && !IndexChecksumHolds(data, shared.header, shared.pieces)) {
    good = false;
    shared.error = ErrorWord(ShardField::kIndexChecksum, 0);
  }
  if (good && shared.header.ext_bytes != 0) {
    good = false;
    shared.error = ErrorWord(ShardField::kExtension, 0);
  }
  if (good) {
    PlaceBlocks(data, size, view, shard, &shared);
    if (shared.error == kNoError) {
      CheckFactors(view, shard, &shared);
    }
    __syncthreads();
    good = shared.error == kNoError;
    if (!good) {
      for (size_t i = threadIdx.x; i < places; i += kThreads) {
        blocks[i] = BlockDesc{};
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ShardInfo info;
    const Header& header = shared.header;
    if (good) {
      info.tokens = header.tokens;
      info.first_token = header.first_token;
      info.raw_rows = header.raw_rows;
      info.dtype = static_cast<uint8_t>(header.dtype);
      info.family = static_cast<uint8_t>(header.family);
      info.preview =
          size < header.low_begin + header.low_bytes + header.scales_bytes + header.codes_bytes ? 1
                                                                                                : 0;
    }
    view.shards[shard] = info;
    status[shard] = good ? 0 : shared.error;
  }
}

}  // namespace

uint64_t ApiViewBytes(const ShardBatch& batch) { return ValidBatch(batch) ? ViewBytes(batch) : 0; }

int ApiParse(const ParseParams& params, void* stream) {
  const ShardBatch& batch = params.batch;
  if (!ValidBatch(batch) || batch.bytes == nullptr || batch.sizes == nullptr ||
      params.view == nullptr || params.view_bytes < ViewBytes(batch) || params.status == nullptr) {
    return kBadArgument;
  }
  ParseKernel<<<batch.shards, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      batch, ViewOf(batch, params.view), params.status);
  return cudaGetLastError();
}

}  // namespace kvshrink::cuda
