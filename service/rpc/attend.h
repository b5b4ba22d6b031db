// Attend: one layer's queries against chunks, on the compressed form.
#pragma once

#include <string>
#include <vector>

#include "service/engine/attend.h"
#include "service/rpc/object_stream.h"

namespace kvshrink::service {

struct AttendDetails {
  AttendTask task;
  DType dtype = DType::kFp32;  // of the queries
  uint32_t layer = 0;
  uint32_t kv_heads = 0;
  std::vector<store::ChunkKey> chunks;
};

class AttendStream final
    : public ObjectStream<v1::AttendRequest, v1::AttendResponse, v1::AttendHeader, AttendDetails> {
 public:
  AttendStream(Environment& env, grpc::CallbackServerContext* context);

 private:
  uint64_t IdOf(const v1::AttendHeader& header) const override { return header.request_id(); }
  uint64_t BodyBytesOf(const v1::AttendHeader& header) const override;
  v1::ObjectStatus* StatusOf(v1::AttendResponse* response) const override {
    return response->mutable_header()->mutable_status();
  }
  absl::StatusOr<Accepted<AttendDetails>> Check(const v1::AttendHeader& header) override;
  absl::StatusOr<Answer> Work(Object& object) override;

  // Looks every chunk up and checks the request against its shard; returns the bytes of the largest
  // shard.
  absl::StatusOr<uint64_t> CheckChunks(const v1::AttendHeader& header,
                                       AttendDetails& details) const;
  absl::Status AddChunk(const AttendDetails& details, const store::ChunkKey& key, const float* q,
                        uint64_t* tokens, AttendSink* sink) const;

  const std::string tenant_;
};

}  // namespace kvshrink::service
