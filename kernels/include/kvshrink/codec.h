// Tensors to shards and back.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/basis.h"
#include "kvshrink/block.h"
#include "kvshrink/profile.h"
#include "kvshrink/rope.h"
#include "kvshrink/shard.h"

namespace kvshrink {

struct BlockPlan;  // block_plan.h

inline constexpr uint32_t kDefaultRawTokens = 1;
inline constexpr int kMaxRank = 12;  // of the kvs profiles

struct EncodeOptions {
  Profile profile = kDefaultProfile;
  uint32_t layer = 0;
  uint32_t first_token = 0;  // position of the chunk's first token in its sequence
  // Tokens at the start of the sequence that are kept exactly (attention sinks). Rows of this chunk
  // with a position below it.
  uint32_t raw_tokens = kDefaultRawTokens;
  // Bound on a block's sum of squared error / sum of squares; 0 = none. A block above it gets more
  // bits, then is kept raw.
  double max_relative_error = 0;
  // Bits per entry that the shard keeps to, every byte counted; 0 = what the profile's rule gives.
  // Alphabets and ranks are then chosen over the shard's blocks for the least attention error. kvs
  // profiles; not together with max_relative_error.
  double bits_per_entry = 0;
  // With bits_per_entry: every shard of a shape has the same size, ShardBytesAt(). For stores of
  // equal slots.
  bool fixed_size = false;
  // The embedding that K carries: it is undone before coding and redone by decoders. Any profile;
  // `raw`, which codes nothing, leaves it out.
  std::optional<Rope> rope = std::nullopt;
  // The calibrated basis that profile kvs2c codes K in; must have the layer, its shape and its
  // rope, and outlive the call. Other profiles leave it out.
  const Basis* basis = nullptr;
};

// Checks a rate target and what it can't go with. Errors: INVALID_ARGUMENT naming the field.
absl::Status CheckRate(const EncodeOptions& options);

// Rows of a chunk of `tokens` that are kept exactly.
constexpr uint32_t RawRows(const EncodeOptions& options, uint32_t tokens) {
  const uint32_t left =
      options.raw_tokens > options.first_token ? options.raw_tokens - options.first_token : 0;
  return left < tokens ? left : tokens;
}

// Size of a shard with `fixed_size`, and the most of any shard with this `bits_per_entry`: a whole
// number of 32-bit words.
uint64_t ShardBytesAt(const TensorShape& shape, double bits_per_entry, bool keys_only = false);

// What one half (K or V) of a shard became. All zero for the V of a shard of keys only.
struct KindReport {
  uint64_t bytes = 0;       // its sections, and half of what both share
  uint64_t entries = 0;     // values
  double error_energy = 0;  // sum of squared error of what a decoder sees (fp32 output)
  double energy = 0;        // sum of squares (finite blocks)
  uint32_t blocks = 0;
  uint32_t raw_blocks = 0;  // kept exactly because not finite, over the bound, or no larger raw
  uint32_t escalated_blocks = 0;  // got more bits than the profile's because of max_relative_error
  std::array<uint32_t, 128> rank_histogram{};
  double max_block_relative_error = 0;

  double bits_per_entry() const;
  double relative_error() const { return energy > 0 ? error_energy / energy : 0; }
  double mean_rank() const;  // over blocks that are not raw
  void Add(const KindReport& other);
};

struct ShardReport {
  uint64_t raw_bytes = 0;
  uint64_t encoded_bytes = 0;
  KindReport k, v;

  uint64_t entries() const { return k.entries + v.entries; }
  double bits_per_entry() const;
  // Adds bytes that K and V share: half to each, all to K where there is no V.
  void AddShared(uint64_t bytes);
};

// What is reconstructed from a shard.
enum class DecodeForm : uint8_t {
  kFull,
  kLowRank,  // raw rows and low-rank part only; works on previews
};

// Runs the stages of the codec on blocks. Backends are thread-safe and keep no state between
// blocks: a block's code depends on the block and its options alone.
class Backend {
 public:
  virtual ~Backend();
  virtual std::string_view name() const = 0;

  // Runs body(i) for i < count, on the backend's threads where it has some; returns when all are
  // done. For work beside the stages (gathering, decoding block by block). `body` must not throw.
  virtual void ForEach(size_t count, absl::FunctionRef<void(size_t)> body) const;

  struct BlockInput {
    // n x d, row-major, contiguous; the raw rows are part of it and are zeroed by the backend.
    const float* rows = nullptr;
    Kind kind = Kind::kKey;
    uint32_t n = 0;
    uint32_t d = 0;
    uint32_t raw_rows = 0;
    const BlockPlan* plan = nullptr;  // kvs: in place of the profile's own choice
    // Codes of the profile's ladder that are passed over, being too small for the block's bound.
    uint32_t skipped_codes = 0;
  };
  struct BlockOutput {
    BlockCode code = BlockCode::kZero;
    int exponent = 0;
    uint32_t rank = 0;
    std::vector<uint8_t> factors, scales, codes;
    double error_energy = 0;  // over the coded rows, of the values as decoded
    double energy = 0;        // of the coded rows
    bool escalated = false;
  };
  struct BlockSettings {
    Profile profile = kDefaultProfile;
    double max_relative_error = 0;
    size_t raw_value_bytes =
        2;  // a record that isn't smaller than this per value is refused: code kRaw
  };

  // The coded rows of a block as its decoder holds them before the inverse rotation:
  // rows = token_factors (m x rank) channel_factors (rank x d) + residual (m x d), where the rows
  // of `residual` are in the rotated basis when `rotated`. The block's exponent is applied to
  // token_factors and residual.
  struct UnpackedBlock {
    uint32_t rank = 0;
    bool rotated = false;
    std::vector<float> token_factors, channel_factors, residual;
  };

  // What a plan is made from. `coded` is false for blocks that are zero or have to be kept exactly.
  struct BlockSpectrum {
    bool coded = false;
    BlockCode code = BlockCode::kZero;  // where it isn't
    double energy = 0;                  // of the coded rows
    int count = 0;
    std::array<double, 16> lambda{};  // largest squared singular values, descending
  };

  // The spectra of a batch (kvs profiles).
  virtual void AnalyseBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                             std::span<BlockSpectrum> out) const = 0;

  // Codes a batch. A block that has to be kept exactly comes back as kRaw with empty parts; the
  // caller copies its bytes.
  virtual void EncodeBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                            std::span<BlockOutput> out) const = 0;

  // Checks and unpacks one block whose code is not kRaw; buffers of `out` are reused. Errors:
  // DATA_LOSS naming the field.
  virtual absl::Status UnpackBlock(Family family, const BlockView& block, uint32_t head_dim,
                                   DecodeForm form, UnpackedBlock* out) const = 0;

  // The coded rows of one block (m x d fp32, row-major) into `rows`. Errors: DATA_LOSS naming
  // block[i] and the field. `code` of the block is not kRaw. With kLowRank the residual is left out
  // and scales and codes aren't read.
  virtual absl::Status DecodeBlock(Family family, const BlockView& block, uint32_t head_dim,
                                   DecodeForm form, float* rows) const = 0;
};

// The scalar double-precision pipeline in the order of the specification: the oracle of tests.
// `exact` takes the eigenpairs from a dense solver in place of the subspace iteration.
std::unique_ptr<Backend> MakeReferenceBackend(bool exact = false);

// What runs on CPUs. threads = 0: one per core. The result doesn't depend on it.
std::unique_ptr<Backend> MakeCpuBackend(int threads = 0);

// K and V must have equal shape and dtype; without V the shard holds keys only. Thread-safe;
// allocates the result. Errors: INVALID_ARGUMENT naming the field. `report` may be null.
absl::StatusOr<std::string> EncodeShard(const Backend& backend, const ConstTensor& k,
                                        const std::optional<ConstTensor>& v,
                                        const EncodeOptions& options,
                                        ShardReport* report = nullptr);

// Decodes into k and v, whose shape must be the shard's; v is given when the shard has V. dtype and
// layout are free (round to nearest even; finite values that are too large become the largest
// finite one). Raw rows and blocks are bit-exact when the dtype is the shard's. On an error the
// outputs hold unspecified values. `basis`: that of a kvs2c shard; others take null as well.
// Errors: INVALID_ARGUMENT (outputs, a basis that doesn't fit), FAILED_PRECONDITION (basis missing,
// or another one), DATA_LOSS (shard).
absl::Status DecodeShard(const Backend& backend, const Shard& shard, DecodeForm form,
                         const MutableTensor& k, const std::optional<MutableTensor>& v,
                         const Basis* basis = nullptr);

// Measures a shard against its source tensors (v when the shard has V): the decoder's own view of
// the report (tests, `kvshrink eval`).
absl::StatusOr<ShardReport> MeasureShard(const Backend& backend, const Shard& shard,
                                         const ConstTensor& k, const std::optional<ConstTensor>& v,
                                         const Basis* basis = nullptr);

}  // namespace kvshrink
