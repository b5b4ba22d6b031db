// Codec: what runs the codec on whole objects, the CPU or a GPU. It knows tensors and shards, never
// keys.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kvshrink/codec.h"
#include "kvshrink/shard.h"
#include "service/engine/tensor_plan.h"

namespace kvshrink::service {

// `ran_on` is "cpu" or "cuda": what made this object, which needn't be what the daemon prefers.
struct EncodedTensor {
  std::string shard;
  ShardReport report;
  std::string_view ran_on;
};
struct DecodedShard {
  std::string body;  // as the plan says; gaps between strides are zero
  std::string_view ran_on;
};

struct CodecHealth {
  bool has_device = false;  // false: a CPU alone
  bool lost = false;        // the device failed; the CPU has taken over for good
};

// Thread-safe; a call blocks its thread until the object is done.
class Codec {
 public:
  virtual ~Codec() = default;

  // "cpu" or "cuda".
  virtual std::string_view backend() const = 0;
  // Name of the device; "" for the CPU.
  virtual std::string device() const = 0;
  virtual CodecHealth health() const = 0;

  // `body` holds K and V as `plan` says. Errors: INVALID_ARGUMENT naming the field.
  virtual absl::StatusOr<EncodedTensor> Encode(const TensorPlan& plan, std::string_view body,
                                               const EncodeOptions& options) = 0;

  // `bytes` are those that `shard` was parsed from. `kv_heads`, ascending, picks heads; empty =
  // all; plan.shape has as many heads as are picked. `basis`: the shard's, null where it has none.
  // Errors: INVALID_ARGUMENT (a head that isn't there), DATA_LOSS.
  virtual absl::StatusOr<DecodedShard> Decode(const Shard& shard, std::string_view bytes,
                                              DecodeForm form, const TensorPlan& plan,
                                              std::span<const uint32_t> kv_heads,
                                              const Basis* basis) = 0;
};

// Runs on `backend`, which must outlive it.
std::unique_ptr<Codec> MakeCpuCodec(const Backend& backend);

}  // namespace kvshrink::service
