#include "service/engine/codec.h"

#include <utility>

#include "service/engine/coding.h"

namespace kvshrink::service {
namespace {

class CpuCodec final : public Codec {
 public:
  explicit CpuCodec(const Backend& backend) : backend_(backend) {}

  std::string_view backend() const override { return backend_.name(); }
  std::string device() const override { return ""; }
  CodecHealth health() const override { return {}; }

  absl::StatusOr<EncodedTensor> Encode(const TensorPlan& plan, std::string_view body,
                                       const EncodeOptions& options) override {
    EncodedTensor encoded{.shard = "", .report = {}, .ran_on = backend_.name()};
    absl::StatusOr<std::string> shard =
        EncodeShard(backend_, plan.K(body), plan.V(body), options, &encoded.report);
    if (!shard.ok()) {
      return shard.status();
    }
    encoded.shard = *std::move(shard);
    return encoded;
  }

  absl::StatusOr<DecodedShard> Decode(const Shard& shard, std::string_view /*bytes*/,
                                      DecodeForm form, const TensorPlan& plan,
                                      std::span<const uint32_t> kv_heads,
                                      const Basis* basis) override {
    absl::StatusOr<std::string> body = DecodeToBytes(backend_, shard, form, plan, kv_heads, basis);
    if (!body.ok()) {
      return body.status();
    }
    return DecodedShard{*std::move(body), backend_.name()};
  }

 private:
  const Backend& backend_;
};

}  // namespace

std::unique_ptr<Codec> MakeCpuCodec(const Backend& backend) {
  return std::make_unique<CpuCodec>(backend);
}

}  // namespace kvshrink::service
