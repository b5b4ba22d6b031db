// Get: shards of chunks in layer order, as stored, decoded, or as previews.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "service/rpc/bidi_stream.h"
#include "service/rpc/tensor_spec.h"

namespace kvshrink::service {

// Serves one request at a time and makes an answer when at most one other waits to be written, so
// that the first layer is on its way before the next is read.
class GetStream final : public BidiStream<v1::GetRequest, v1::GetResponse> {
 public:
  GetStream(Environment& env, grpc::CallbackServerContext* context);

 private:
  using Answer = Outgoing<v1::GetResponse>;

  // A request in progress: `chunk` and `layer` say which answer is next.
  struct Progress {
    v1::GetRequest request;
    std::shared_ptr<Ticket> ticket;
    int chunk = 0;
    size_t layer = 0;              // index into `layers`
    std::vector<uint32_t> layers;  // of the chunk that `chunk` names; empty: not looked up yet
  };

  absl::Status OnMessage(v1::GetRequest& request) override;
  absl::Status OnEnd() override { return absl::OkStatus(); }
  bool InsideObject() const override { return false; }
  void Pump() override;

  absl::Status Check(const v1::GetRequest& request) const;
  // The most memory that an answer of the request takes.
  uint64_t LargestAnswerBytes(const v1::GetRequest& request) const;
  uint64_t AnswerBytes(const v1::GetRequest& request, const store::ShardMeta& meta) const;

  void RunNext();
  // The next answer, and where `progress_` goes on.
  Answer Next(Progress& progress);
  absl::Status FindLayers(Progress& progress) const;
  absl::StatusOr<Answer> Load(const Progress& progress, const store::ChunkKey& key, uint32_t layer);
  absl::StatusOr<Answer> Decode(const Progress& progress, const Shard& shard,
                                std::string_view bytes);
  Answer ErrorAnswer(const v1::GetRequest& request, const absl::Status& status) const;

  const std::string tenant_;
  absl::Mutex progress_mu_;
  std::shared_ptr<Progress> progress_ ABSL_GUARDED_BY(progress_mu_);  // null: no request
  bool running_ ABSL_GUARDED_BY(progress_mu_) = false;                // a job makes an answer
};

}  // namespace kvshrink::service
