// Calibrated bases (proto/FORMAT.md section 9): for every layer and kv head of a model the metric
// in which its queries look at keys. An error e of a key costs what queries make of it, q.e, and
// queries are far from isotropic: profile kvs2c codes the rows of K times W and decodes them times
// W^-1, so that the codec's white error falls where queries don't look.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvshrink/rope.h"

namespace kvshrink {

struct ShardHeader;

// Of a basis's content: two XXH64. Tells bases apart; it is no proof against forgery.
using BasisId = std::array<uint8_t, 16>;
std::string BasisIdText(const BasisId& id);  // 32 hex digits

inline constexpr float kMinBasisGain = 1.0F / 64;
inline constexpr float kMaxBasisGain = 64;
inline constexpr size_t kMaxBasisModelBytes = 255;
inline constexpr size_t kMaxBasisMetadataBytes = size_t{1} << 20;

// What a basis is made from: W = sum_i gain_i u_i u_i^T.
struct BasisLayer {
  uint32_t layer = 0;
  // The metric is that of keys before this embedding (rotary_dim set); none: of keys as they are.
  std::optional<Rope> rope;
  std::vector<float> gains;    // [kv_heads, head_dim], kMinBasisGain..kMaxBasisGain
  std::vector<float> vectors;  // [kv_heads, head_dim, head_dim], rows u_i, orthonormal
};
struct BasisContents {
  std::string model;            // free text without control characters
  std::string metadata = "{}";  // a JSON object
  uint32_t head_dim = 0;
  uint32_t kv_heads = 0;
  uint64_t queries = 0;            // that it was calibrated on, of all heads and layers
  std::vector<BasisLayer> layers;  // by ascending number
};

// The bytes of a .kvb file. Nothing is checked: Basis::Parse does that.
std::string WriteBasis(const BasisContents& contents);

class Basis {
 public:
  // Runs every check of FORMAT.md section 9; copies what it needs. The metadata's JSON is not
  // looked at. Errors: DATA_LOSS naming the field.
  static absl::StatusOr<Basis> Parse(std::string_view bytes);

  const BasisId& id() const { return id_; }
  const std::string& model() const { return model_; }
  const std::string& metadata() const { return metadata_; }
  uint32_t head_dim() const { return head_dim_; }
  uint32_t kv_heads() const { return kv_heads_; }
  uint64_t queries() const { return queries_; }

  struct Layer {
    uint32_t layer = 0;
    std::optional<Rope> rope;
    float largest_gain = 0;
    float smallest_gain = 0;
  };
  const std::vector<Layer>& layers() const { return layers_; }
  // Null when there is no such layer.
  const Layer* layer(uint32_t number) const;

  // W and W^-1 of one kv head, [head_dim, head_dim], symmetric; live as long as the basis.
  struct Metric {
    const float* weight = nullptr;
    const float* inverse = nullptr;
  };
  // The layer is there, the head below kv_heads.
  Metric metric(uint32_t layer, uint32_t head) const;

 private:
  absl::Status ReadLayer(const uint8_t** data, const uint8_t* end);

  BasisId id_{};
  std::string model_, metadata_;
  uint32_t head_dim_ = 0;
  uint32_t kv_heads_ = 0;
  uint64_t queries_ = 0;
  std::vector<Layer> layers_;
  std::vector<float> matrices_;  // [layers, kv_heads, 2, head_dim, head_dim]
};

// Whether a basis has what a tensor of this layer and shape needs, its K carrying `rope`
// (position_offset doesn't matter). Errors: INVALID_ARGUMENT naming basis.<field>.
absl::Status CheckBasisFits(const Basis& basis, uint32_t layer, uint32_t head_dim,
                            uint32_t kv_heads, const std::optional<Rope>& rope);

// Whether `basis` (may be null) is the one that a shard was coded with; shards without one take
// any. Errors: FAILED_PRECONDITION naming basis and both ids, INVALID_ARGUMENT naming
// basis.<field>.
absl::Status CheckBasisOf(const ShardHeader& header, const Basis* basis);

}  // namespace kvshrink
