// Put: shards into the store, from tensors or already encoded.
#pragma once

#include <optional>

#include "service/rpc/object_stream.h"
#include "service/rpc/tensor_spec.h"

namespace kvshrink::service {

struct PutDetails {
  store::ChunkKey key;
  uint32_t layer = 0;
  uint32_t layers = 0;
  std::optional<TensorPlan> tensor;  // none: the body is a shard
  EncodeOptions options;
};

class PutStream final
    : public ObjectStream<v1::PutRequest, v1::PutResponse, v1::PutHeader, PutDetails> {
 public:
  PutStream(Environment& env, grpc::CallbackServerContext* context);

 private:
  uint64_t IdOf(const v1::PutHeader& header) const override { return header.object_id(); }
  uint64_t BodyBytesOf(const v1::PutHeader& header) const override { return header.body_bytes(); }
  v1::ObjectStatus* StatusOf(v1::PutResponse* response) const override {
    return response->mutable_status();
  }
  absl::StatusOr<Accepted<PutDetails>> Check(const v1::PutHeader& header) override;
  absl::StatusOr<Answer> Work(Object& object) override;

  absl::Status CheckContent(const v1::PutHeader& header, PutDetails& details) const;

  const std::string tenant_;
};

}  // namespace kvshrink::service
