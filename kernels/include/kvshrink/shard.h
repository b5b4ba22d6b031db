// Reading the structure of a shard: header, index, where each block's parts lie. Format:
// proto/FORMAT.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kvshrink/basis.h"
#include "kvshrink/block.h"
#include "kvshrink/profile.h"
#include "kvshrink/rope.h"

namespace kvshrink {

enum class Kind : uint8_t { kKey = 0, kValue = 1 };

// A block's part of a section is padded to whole 32-bit words.
constexpr size_t PaddedBytes(size_t bytes) { return (bytes + 3) / 4 * 4; }

// What changes the meaning of a shard's codes, where it was used (proto/FORMAT.md section 3.2).
struct ShardExtensions {
  std::optional<Rope> rope = std::nullopt;  // K is coded before this embedding
  std::optional<BasisId> basis =
      std::nullopt;  // K is coded in the metric of this basis; with profile kvs2c
};

struct ShardHeader {
  Profile profile = kDefaultProfile;
  DType dtype = DType::kFp16;
  TensorShape shape;
  uint32_t first_token = 0;
  uint32_t layer = 0;
  uint32_t raw_rows = 0;
  bool padded = false;     // zero bytes after the last block's codes
  bool keys_only = false;  // there is no V: latents and shared rotary parts of MLA
  ShardExtensions extensions;

  uint32_t kinds() const { return keys_only ? 1 : 2; }
  uint32_t blocks_per_head() const { return (shape.tokens + kBlockTokens - 1) / kBlockTokens; }
  uint32_t blocks() const { return kinds() * shape.kv_heads * blocks_per_head(); }
  // Values of K and V.
  uint64_t entries() const { return kinds() * uint64_t{shape.entries()}; }
  // Bytes of K and V in the header's dtype.
  uint64_t raw_bytes() const { return entries() * DTypeBytes(dtype); }
};

// One block's place in its tensor and its parts in the shard. Spans point into the shard's bytes.
struct BlockView {
  uint32_t index = 0;  // number of the block in the shard
  Kind kind = Kind::kKey;
  uint32_t head = 0;
  uint32_t first_row = 0;  // token of the chunk
  uint32_t rows = 0;       // n
  uint32_t raw_rows = 0;   // leading rows of the block that are kept exactly
  int exponent = 0;
  BlockCode code = BlockCode::kZero;
  uint32_t rank = 0;
  std::span<const uint8_t> raw;      // raw rows
  std::span<const uint8_t> factors;  // factor record
  std::span<const uint8_t> scales;   // empty in a preview
  std::span<const uint8_t> codes;    // empty in a preview

  uint32_t coded_rows() const { return rows - raw_rows; }
  // Of its parts, padding included.
  size_t bytes() const {
    return PaddedBytes(raw.size() + factors.size()) + PaddedBytes(scales.size()) +
           PaddedBytes(codes.size());
  }
};

enum class Extent : uint8_t {
  kWhole,         // the byte string must be the whole shard
  kAllowPreview,  // it may end at or after the end of the LOW section
};

// A checked view of a shard. Does not own `bytes`, which must outlive it.
class Shard {
 public:
  // Runs every check of FORMAT.md section 6 up to the factor records (what a block's decoder checks
  // is left to it). Allocates only a table whose size the given bytes bound. Errors: DATA_LOSS
  // naming the field.
  static absl::StatusOr<Shard> Parse(std::string_view bytes, Extent extent = Extent::kWhole);

  const ShardHeader& header() const { return header_; }
  bool preview() const { return preview_; }  // SCALES and CODES are not there
  std::span<const BlockView> blocks() const { return blocks_; }
  // `kind` must be there: no kValue where the header says keys only.
  const BlockView& block(Kind kind, uint32_t head, uint32_t index) const;
  size_t bytes() const { return bytes_; }                  // of the byte string given
  size_t preview_bytes() const { return preview_bytes_; }  // length of its preview
  size_t shared_bytes() const { return shared_bytes_; }    // header, extensions, index, padding

 private:
  ShardHeader header_;
  std::vector<BlockView> blocks_;
  size_t bytes_ = 0;
  size_t preview_bytes_ = 0;
  size_t shared_bytes_ = 0;
  bool preview_ = false;
};

}  // namespace kvshrink
