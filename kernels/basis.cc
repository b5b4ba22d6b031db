#include "kvshrink/basis.h"

#include <Eigen/Dense>
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <span>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "format/extensions.h"
#include "format/layout.h"
#include "kvshrink/block.h"
#include "kvshrink/error.h"
#include "kvshrink/shard.h"
#include "kvshrink/strcat.h"

namespace kvshrink {
namespace {

using format::LoadLittle;
using format::StoreLittle;

constexpr std::string_view kMagic = "KVSB";
constexpr uint16_t kVersion = 1;
constexpr size_t kHeaderBytes = 48;
constexpr size_t kLayerHeaderBytes = 8;
constexpr size_t kMinMetadataBytes = 2;
constexpr double kOrthonormalTolerance = 1e-4;

namespace at {
constexpr size_t kVersion = 4, kFlags = 6, kHeadDim = 8, kKvHeads = 10, kLayers = 12, kQueries = 16,
                 kModelBytes = 24, kReserved = 26, kMetadataBytes = 28, kId = 32;
}  // namespace at

template <typename Value>
absl::Status BadBasis(std::string_view field, const Value& value, std::string_view rule) {
  return absl::DataLossError(StrCat("field 'basis.", field, "' is ", value, ": ", rule));
}

absl::Status CheckLimit(std::string_view field, uint64_t value, uint64_t least, uint64_t most) {
  if (value < least || value > most) {
    return BadBasis(field, value, StrCat("must be ", least, "..", most));
  }
  return absl::OkStatus();
}

// Over everything but the id itself.
BasisId IdOf(std::string_view bytes) {
  BasisId id;
  for (uint64_t seed = 0; seed < 2; ++seed) {
    XXH64_state_t state;
    XXH64_reset(&state, seed);
    XXH64_update(&state, bytes.data(), at::kId);
    XXH64_update(&state, bytes.data() + kHeaderBytes, bytes.size() - kHeaderBytes);
    StoreLittle<uint64_t>(XXH64_digest(&state), id.data() + 8 * seed);
  }
  return id;
}

void AppendFloats(const std::vector<float>& values, size_t first, size_t count, std::string* out) {
  for (size_t i = first; i < first + count; ++i) {
    uint8_t bytes[sizeof(float)];
    StoreLittle(std::bit_cast<uint32_t>(values[i]), bytes);
    out->append(reinterpret_cast<const char*>(bytes), sizeof(bytes));
  }
}

float LoadFloat(const uint8_t* data) { return std::bit_cast<float>(LoadLittle<uint32_t>(data)); }

size_t HeadBytes(size_t head_dim) { return (head_dim + head_dim * head_dim) * sizeof(float); }

// Reads one head's record and makes W and W^-1 of it. `place` names it in errors.
absl::Status ReadHead(const uint8_t* data, uint32_t d, const std::string& place, float* matrices,
                      Basis::Layer* layer) {
  Eigen::VectorXd gains(d);
  for (uint32_t i = 0; i < d; ++i) {
    const float gain = LoadFloat(data + i * sizeof(float));
    if (!(gain >= kMinBasisGain && gain <= kMaxBasisGain)) {
      return BadBasis(StrCat(place, "gain[", i, "]"), gain, "must be 1/64..64");
    }
    gains(i) = static_cast<double>(gain);
    layer->largest_gain = std::max(layer->largest_gain, gain);
    layer->smallest_gain = std::min(layer->smallest_gain, gain);
  }
  data += d * sizeof(float);
  Eigen::MatrixXd vectors(d, d);  // columns u_i
  for (uint32_t i = 0; i < d; ++i) {
    for (uint32_t c = 0; c < d; ++c) {
      vectors(c, i) = static_cast<double>(LoadFloat(data + (size_t{i} * d + c) * sizeof(float)));
    }
  }
  const Eigen::MatrixXd gram = vectors.transpose() * vectors;
  for (uint32_t i = 0; i < d; ++i) {
    for (uint32_t j = 0; j <= i; ++j) {
      const double off = std::abs(gram(i, j) - (i == j ? 1 : 0));
      if (!(off <= kOrthonormalTolerance)) {
        return BadBasis(StrCat(place, "vector[", i, "]"), off,
                        "off from orthonormal by more than 1e-4");
      }
    }
  }
  for (const bool inverse : {false, true}) {
    const Eigen::VectorXd scale = inverse ? Eigen::VectorXd(gains.cwiseInverse()) : gains;
    const Eigen::MatrixXd product = vectors * scale.asDiagonal() * vectors.transpose();
    for (uint32_t i = 0; i < d; ++i) {
      for (uint32_t j = 0; j < d; ++j) {
        // Symmetric to the last bit.
        *matrices++ = static_cast<float>(i < j ? product(i, j) : product(j, i));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckText(std::string_view field, const std::string& text) {
  for (const char byte : text) {
    if (static_cast<unsigned char>(byte) < 0x20 || byte == 0x7F) {
      return BadBasis(field, static_cast<int>(byte), "must have no control characters");
    }
  }
  return absl::OkStatus();
}

bool SameEmbedding(std::optional<Rope> a, std::optional<Rope> b) {
  for (std::optional<Rope>* rope : {&a, &b}) {
    if (rope->has_value()) {
      (*rope)->position_offset = 0;
    }
  }
  return a == b;
}

template <typename Value>
absl::Status Misfit(std::string_view field, const Value& value, std::string_view rule) {
  return BadArgument(StrCat("basis.", field), value, rule);
}

absl::Status CheckShape(const Basis& basis, uint32_t layer, uint32_t head_dim, uint32_t kv_heads) {
  if (basis.head_dim() != head_dim) {
    return Misfit("head_dim", basis.head_dim(), StrCat("the tensors' is ", head_dim));
  }
  if (basis.kv_heads() != kv_heads) {
    return Misfit("kv_heads", basis.kv_heads(), StrCat("the tensors' is ", kv_heads));
  }
  if (basis.layer(layer) == nullptr) {
    return Misfit("layers", StrCat("a set of ", basis.layers().size()),
                  StrCat("layer ", layer, " is not in it"));
  }
  return absl::OkStatus();
}

}  // namespace

std::string BasisIdText(const BasisId& id) {
  std::string text;
  for (const uint8_t byte : id) {
    text += StrCat(absl::Hex(byte, absl::kZeroPad2));
  }
  return text;
}

std::string WriteBasis(const BasisContents& contents) {
  std::string out(kHeaderBytes, '\0');
  auto* data = reinterpret_cast<uint8_t*>(out.data());
  std::copy(kMagic.begin(), kMagic.end(), out.begin());
  StoreLittle(kVersion, data + at::kVersion);
  StoreLittle(static_cast<uint16_t>(contents.head_dim), data + at::kHeadDim);
  StoreLittle(static_cast<uint16_t>(contents.kv_heads), data + at::kKvHeads);
  StoreLittle(static_cast<uint32_t>(contents.layers.size()), data + at::kLayers);
  StoreLittle(contents.queries, data + at::kQueries);
  StoreLittle(static_cast<uint16_t>(contents.model.size()), data + at::kModelBytes);
  StoreLittle(static_cast<uint32_t>(contents.metadata.size()), data + at::kMetadataBytes);
  out += contents.model + contents.metadata;
  const size_t d = contents.head_dim;
  for (const BasisLayer& layer : contents.layers) {
    const std::string rope = layer.rope ? format::RopePayload(*layer.rope) : "";
    uint8_t header[kLayerHeaderBytes] = {};
    StoreLittle(static_cast<uint16_t>(layer.layer), header);
    StoreLittle(static_cast<uint16_t>(rope.size()), header + 2);
    out.append(reinterpret_cast<const char*>(header), sizeof(header));
    out += rope;
    for (size_t head = 0; head < contents.kv_heads; ++head) {
      AppendFloats(layer.gains, head * d, d, &out);
      AppendFloats(layer.vectors, head * d * d, d * d, &out);
    }
  }
  const BasisId id = IdOf(out);
  std::copy(id.begin(), id.end(), out.begin() + at::kId);
  return out;
}

absl::StatusOr<Basis> Basis::Parse(std::string_view bytes) {
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  if (bytes.size() < kHeaderBytes) {
    return BadBasis("size", bytes.size(), StrCat("a header has ", kHeaderBytes, " bytes"));
  }
  if (bytes.substr(0, 4) != kMagic) {
    return BadBasis("magic", StrCat(absl::Hex(LoadLittle<uint32_t>(data), absl::kZeroPad8)),
                    "must be KVSB");
  }
  if (const auto version = LoadLittle<uint16_t>(data + at::kVersion); version != kVersion) {
    return BadBasis("version", version, StrCat("this build reads version ", kVersion));
  }
  Basis basis;
  basis.head_dim_ = LoadLittle<uint16_t>(data + at::kHeadDim);
  basis.kv_heads_ = LoadLittle<uint16_t>(data + at::kKvHeads);
  basis.queries_ = LoadLittle<uint64_t>(data + at::kQueries);
  const auto layers = LoadLittle<uint32_t>(data + at::kLayers);
  const auto model_bytes = LoadLittle<uint16_t>(data + at::kModelBytes);
  const auto metadata_bytes = LoadLittle<uint32_t>(data + at::kMetadataBytes);
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("flags", LoadLittle<uint16_t>(data + at::kFlags), 0, 0));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("head_dim", basis.head_dim_, 1, kMaxHeadDim));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("kv_heads", basis.kv_heads_, 1, kMaxKvHeads));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("layers", layers, 1, kMaxLayer + 1));
  KVSHRINK_RETURN_IF_ERROR(CheckLimit("model_bytes", model_bytes, 0, kMaxBasisModelBytes));
  KVSHRINK_RETURN_IF_ERROR(
      CheckLimit("reserved", LoadLittle<uint16_t>(data + at::kReserved), 0, 0));
  KVSHRINK_RETURN_IF_ERROR(
      CheckLimit("metadata_bytes", metadata_bytes, kMinMetadataBytes, kMaxBasisMetadataBytes));
  const uint64_t least =
      kHeaderBytes + model_bytes + metadata_bytes +
      layers * (kLayerHeaderBytes + uint64_t{basis.kv_heads_} * HeadBytes(basis.head_dim_));
  if (bytes.size() < least) {
    return BadBasis("size", bytes.size(), StrCat("must be at least ", least));
  }
  std::copy_n(data + at::kId, sizeof(BasisId), basis.id_.begin());
  if (basis.id_ != IdOf(bytes)) {
    return BadBasis("id", BasisIdText(basis.id_), "doesn't match the content");
  }
  basis.model_ = bytes.substr(kHeaderBytes, model_bytes);
  basis.metadata_ = bytes.substr(kHeaderBytes + model_bytes, metadata_bytes);
  KVSHRINK_RETURN_IF_ERROR(CheckText("model", basis.model_));

  basis.matrices_.reserve(2 * size_t{layers} * basis.kv_heads_ * basis.head_dim_ * basis.head_dim_);
  const uint8_t* next = data + kHeaderBytes + model_bytes + metadata_bytes;
  const uint8_t* end = data + bytes.size();
  for (uint32_t i = 0; i < layers; ++i) {
    KVSHRINK_RETURN_IF_ERROR(basis.ReadLayer(&next, end));
  }
  if (next != end) {
    return BadBasis("size", bytes.size(), StrCat("its layers end at ", next - data));
  }
  return basis;
}

// `data` moves behind the layer's record.
absl::Status Basis::ReadLayer(const uint8_t** data, const uint8_t* end) {
  const auto left = [&] { return static_cast<size_t>(end - *data); };
  const auto place = [&](std::string_view field) {
    return StrCat("layer[", layers_.size(), "].", field);
  };
  if (left() < kLayerHeaderBytes) {
    return BadBasis(place("size"), left(), "a layer begins with 8 bytes");
  }
  Layer layer;
  layer.layer = LoadLittle<uint16_t>(*data);
  const auto rope_bytes = LoadLittle<uint16_t>(*data + 2);
  const auto reserved = LoadLittle<uint32_t>(*data + 4);
  *data += kLayerHeaderBytes;
  if (layer.layer > kMaxLayer || (!layers_.empty() && layer.layer <= layers_.back().layer)) {
    return BadBasis(place("layer"), layer.layer, StrCat("must ascend, at most ", kMaxLayer));
  }
  if (reserved != 0) {
    return BadBasis(place("reserved"), reserved, "must be 0");
  }
  const size_t matrices_bytes = kv_heads_ * HeadBytes(head_dim_);
  if (left() < rope_bytes + matrices_bytes) {
    return BadBasis(place("size"), left(), StrCat("must be ", rope_bytes + matrices_bytes));
  }
  if (rope_bytes > 0) {
    Rope rope;
    if (const auto fault = format::ReadRopePayload({*data, rope_bytes}, head_dim_, &rope)) {
      return BadBasis(place(StrCat("rope.", fault->field)), fault->value, fault->rule);
    }
    layer.rope = rope;
    *data += rope_bytes;
  }
  const size_t count = size_t{head_dim_} * head_dim_;
  const size_t first = matrices_.size();
  matrices_.resize(first + 2 * count * kv_heads_);
  layer.smallest_gain = kMaxBasisGain;
  for (uint32_t head = 0; head < kv_heads_; ++head) {
    KVSHRINK_RETURN_IF_ERROR(ReadHead(*data, head_dim_, place(StrCat("head[", head, "].")),
                                      matrices_.data() + first + 2 * count * head, &layer));
    *data += HeadBytes(head_dim_);
  }
  layers_.push_back(layer);
  return absl::OkStatus();
}

const Basis::Layer* Basis::layer(uint32_t number) const {
  const auto found = std::lower_bound(layers_.begin(), layers_.end(), number,
                                      [](const Layer& a, uint32_t b) { return a.layer < b; });
  return found == layers_.end() || found->layer != number ? nullptr : &*found;
}

Basis::Metric Basis::metric(uint32_t number, uint32_t head) const {
  const auto place = static_cast<size_t>(layer(number) - layers_.data());
  const size_t count = size_t{head_dim_} * head_dim_;
  const float* weight = matrices_.data() + 2 * count * (place * kv_heads_ + head);
  return {weight, weight + count};
}

absl::Status CheckBasisFits(const Basis& basis, uint32_t layer, uint32_t head_dim,
                            uint32_t kv_heads, const std::optional<Rope>& rope) {
  KVSHRINK_RETURN_IF_ERROR(CheckShape(basis, layer, head_dim, kv_heads));
  std::optional<Rope> wanted = rope;
  if (wanted.has_value() && wanted->rotary_dim == 0) {
    wanted->rotary_dim = head_dim;
  }
  const std::optional<Rope>& own = basis.layer(layer)->rope;
  if (!SameEmbedding(own, wanted)) {
    return Misfit("rope", own ? RopeText(*own) : "none",
                  StrCat("layer ", layer, " is coded with ", wanted ? RopeText(*wanted) : "none"));
  }
  return absl::OkStatus();
}

absl::Status CheckBasisOf(const ShardHeader& header, const Basis* basis) {
  if (!header.extensions.basis.has_value()) {
    return absl::OkStatus();
  }
  if (basis == nullptr || basis->id() != *header.extensions.basis) {
    return absl::FailedPreconditionError(
        StrCat("field 'basis' is ", basis == nullptr ? "none" : BasisIdText(basis->id()),
               ": the shard was coded with basis ", BasisIdText(*header.extensions.basis)));
  }
  return CheckShape(*basis, header.layer, header.shape.head_dim, header.shape.kv_heads);
}

}  // namespace kvshrink
