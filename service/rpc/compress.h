// Compress and Decompress: the codec as a service; nothing is stored.
#pragma once

#include "service/rpc/object_stream.h"
#include "service/rpc/tensor_spec.h"

namespace kvshrink::service {

struct CompressDetails {
  TensorPlan tensor;
  EncodeOptions options;
};

class CompressStream final : public ObjectStream<v1::CompressRequest, v1::CompressResponse,
                                                 v1::CompressHeader, CompressDetails> {
 public:
  CompressStream(Environment& env, grpc::CallbackServerContext* context);

 private:
  uint64_t IdOf(const v1::CompressHeader& header) const override { return header.object_id(); }
  uint64_t BodyBytesOf(const v1::CompressHeader& header) const override {
    return header.body_bytes();
  }
  v1::ObjectStatus* StatusOf(v1::CompressResponse* response) const override {
    return response->mutable_header()->mutable_status();
  }
  absl::StatusOr<Accepted<CompressDetails>> Check(const v1::CompressHeader& header) override;
  absl::StatusOr<Answer> Work(Object& object) override;
};

struct DecompressDetails {
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;
  v1::Layout layout;
  bool low_rank = false;
};

class DecompressStream final : public ObjectStream<v1::DecompressRequest, v1::DecompressResponse,
                                                   v1::DecompressHeader, DecompressDetails> {
 public:
  DecompressStream(Environment& env, grpc::CallbackServerContext* context);

 private:
  uint64_t IdOf(const v1::DecompressHeader& header) const override { return header.object_id(); }
  uint64_t BodyBytesOf(const v1::DecompressHeader& header) const override {
    return header.body_bytes();
  }
  v1::ObjectStatus* StatusOf(v1::DecompressResponse* response) const override {
    return response->mutable_header()->mutable_status();
  }
  absl::StatusOr<Accepted<DecompressDetails>> Check(const v1::DecompressHeader& header) override;
  absl::StatusOr<Answer> Work(Object& object) override;
};

}  // namespace kvshrink::service
