#include "format/extensions.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "format/layout.h"
#include "kvshrink/error.h"

namespace kvshrink::format {
namespace {

enum class ExtensionType : uint16_t { kRope = 1, kBasis = 2 };

constexpr size_t kRecordHeaderBytes = 8;
constexpr size_t kRopeBytes = 16;  // before the scaling's numbers

// The numbers that a scaling takes, in the order of the record; none for an unknown one.
std::vector<double Rope::*> ScalingNumbers(RopeScaling scaling) {
  switch (scaling) {
    case RopeScaling::kLinear:
    case RopeScaling::kNtk:
      return {&Rope::factor};
    case RopeScaling::kYarn:
    case RopeScaling::kYarnUntruncated:
      return {&Rope::factor, &Rope::original_max_position, &Rope::beta_fast, &Rope::beta_slow};
    case RopeScaling::kLlama3:
      return {&Rope::factor, &Rope::original_max_position, &Rope::low_freq_factor,
              &Rope::high_freq_factor};
    case RopeScaling::kNone:
      break;
  }
  return {};
}

template <typename T>
void Append(T value, std::string* out) {
  uint8_t bytes[sizeof(T)];
  StoreLittle(value, bytes);
  out->append(reinterpret_cast<const char*>(bytes), sizeof(T));
}

void AppendRecord(ExtensionType type, const std::string& payload, std::string* out) {
  Append(static_cast<uint16_t>(type), out);
  Append(static_cast<uint16_t>(payload.size()), out);
  Append(uint32_t{0}, out);
  out->append(payload);
}

absl::Status ReadRope(std::span<const uint8_t> payload, const TensorShape& shape,
                      std::optional<Rope>* out) {
  Rope rope;
  if (const auto fault = ReadRopePayload(payload, shape.head_dim, &rope)) {
    const std::string field =
        fault->field == "size" ? "extension.size" : StrCat("extension.rope.", fault->field);
    return BadShard(field, fault->value, fault->rule);
  }
  *out = rope;
  return absl::OkStatus();
}

absl::Status ReadBasisId(std::span<const uint8_t> payload, std::optional<BasisId>* out) {
  if (payload.size() != sizeof(BasisId)) {
    return BadShard("extension.size", payload.size(), "must be 16 for a basis");
  }
  std::copy(payload.begin(), payload.end(), out->emplace().begin());
  return absl::OkStatus();
}

}  // namespace

std::string RopePayload(const Rope& rope) {
  std::string payload;
  Append(std::bit_cast<uint64_t>(rope.theta), &payload);
  Append(static_cast<uint16_t>(rope.rotary_dim), &payload);
  Append(static_cast<uint8_t>(rope.pairing), &payload);
  Append(static_cast<uint8_t>(rope.scaling), &payload);
  Append(static_cast<uint32_t>(rope.position_offset), &payload);
  for (const auto number : ScalingNumbers(rope.scaling)) {
    Append(std::bit_cast<uint64_t>(rope.*number), &payload);
  }
  return payload;
}

std::optional<RopeFault> ReadRopePayload(std::span<const uint8_t> payload, uint32_t head_dim,
                                         Rope* out) {
  const auto size_fault = [&](std::string rule) {
    return RopeFault{"size", static_cast<double>(payload.size()), std::move(rule)};
  };
  if (payload.size() < kRopeBytes) {
    return size_fault(StrCat("must be at least ", kRopeBytes));
  }
  Rope rope;
  const uint8_t* data = payload.data();
  rope.theta = std::bit_cast<double>(LoadLittle<uint64_t>(data));
  rope.rotary_dim = LoadLittle<uint16_t>(data + 8);
  rope.pairing = static_cast<RopePairing>(data[10]);
  rope.scaling = static_cast<RopeScaling>(data[11]);
  rope.position_offset = static_cast<int32_t>(LoadLittle<uint32_t>(data + 12));
  const auto numbers = ScalingNumbers(rope.scaling);
  if (const size_t size = kRopeBytes + 8 * numbers.size(); payload.size() != size) {
    return size_fault(StrCat("must be ", size, " for this rope"));
  }
  for (size_t i = 0; i < numbers.size(); ++i) {
    rope.*numbers[i] = std::bit_cast<double>(LoadLittle<uint64_t>(data + kRopeBytes + 8 * i));
  }
  *out = rope;
  return FindRopeFault(rope, head_dim);
}

std::string WriteExtensions(const ShardExtensions& extensions) {
  std::string out;
  if (extensions.rope.has_value()) {
    AppendRecord(ExtensionType::kRope, RopePayload(*extensions.rope), &out);
  }
  if (extensions.basis.has_value()) {
    AppendRecord(ExtensionType::kBasis,
                 std::string(extensions.basis->begin(), extensions.basis->end()), &out);
  }
  return out;
}

absl::Status ReadExtensions(std::span<const uint8_t> bytes, const TensorShape& shape,
                            ShardExtensions* extensions) {
  uint16_t last_type = 0;
  while (!bytes.empty()) {
    if (bytes.size() < kRecordHeaderBytes) {
      return BadShard("extension.size", bytes.size(), "a record begins with 8 bytes");
    }
    const auto type = LoadLittle<uint16_t>(bytes.data());
    const auto size = LoadLittle<uint16_t>(bytes.data() + 2);
    const auto reserved = LoadLittle<uint32_t>(bytes.data() + 4);
    bytes = bytes.subspan(kRecordHeaderBytes);
    if (type <= last_type) {
      return BadShard("extension.type", type, "types must ascend from 1 on, each once");
    }
    last_type = type;
    if (size % kExtensionAlignment != 0 || size > bytes.size()) {
      return BadShard("extension.size", size,
                      StrCat("must be a multiple of 8, at most ", bytes.size()));
    }
    if (reserved != 0) {
      return BadShard("extension.reserved", reserved, "must be 0");
    }
    const std::span<const uint8_t> payload = bytes.first(size);
    bytes = bytes.subspan(size);
    switch (static_cast<ExtensionType>(type)) {
      case ExtensionType::kRope:
        KVSHRINK_RETURN_IF_ERROR(ReadRope(payload, shape, &extensions->rope));
        break;
      case ExtensionType::kBasis:
        KVSHRINK_RETURN_IF_ERROR(ReadBasisId(payload, &extensions->basis));
        break;
      default:
        return BadShard("extension.type", type, "unknown to this build");
    }
  }
  return absl::OkStatus();
}

}  // namespace kvshrink::format
