// A daemon in this process, on a free loopback port, and the calls that tests make to it.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "kvshrink/codec.h"
#include "kvshrink/v1/kvshrink.grpc.pb.h"
#include "service/server.h"

namespace kvshrink::service::testing {

// Loopback, port 0, no HTTP, no disk, the CPU, two threads, quiet.
Options TestOptions();

class Daemon {
 public:
  explicit Daemon(const Options& options = TestOptions(), ServerParts parts = {});

  v1::KVShrink::Stub& stub() { return *stub_; }
  Server& server() { return *server_; }
  const std::shared_ptr<grpc::Channel>& channel() { return channel_; }
  v1::ServerInfoResponse Info();

 private:
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::KVShrink::Stub> stub_;
};

// Encodes nothing until it is opened.
class GatedBackend final : public Backend {
 public:
  explicit GatedBackend(std::shared_ptr<absl::Notification> gate);
  std::string_view name() const override { return inner_->name(); }
  void AnalyseBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                     std::span<BlockSpectrum> out) const override;
  void EncodeBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                    std::span<BlockOutput> out) const override;
  absl::Status UnpackBlock(Family family, const BlockView& block, uint32_t head_dim,
                           DecodeForm form, UnpackedBlock* out) const override;
  absl::Status DecodeBlock(Family family, const BlockView& block, uint32_t head_dim,
                           DecodeForm form, float* rows) const override;

 private:
  std::shared_ptr<absl::Notification> gate_;
  std::unique_ptr<Backend> inner_;
};

// K then V, packed [T,H,D] fp32: a few strong directions and noise, the same for the same seed.
std::string MakeBody(const TensorShape& shape, uint32_t seed);
// The shard that the daemon should make of it.
std::string Encode(const TensorShape& shape, const std::string& body, const EncodeOptions& options);
// fp32 [T,H,D], K then V.
std::vector<float> Decode(const std::string& shard, DecodeForm form = DecodeForm::kFull);

inline constexpr TensorShape kShape = {64, 2, 32};

v1::ChunkId Id(const std::string& key, const std::string& name_space = "model");
v1::TensorSpec Spec(const TensorShape& shape);
v1::PutHeader TensorHeader(uint64_t id, const std::string& key, uint32_t layer, uint32_t layers,
                           const TensorShape& shape = kShape);
v1::PutHeader ShardHeaderOf(uint64_t id, const std::string& key, uint32_t layer, uint32_t layers,
                            const std::string& shard);

template <class Request>
Request FrameOf(std::string bytes) {
  Request request;
  request.set_frame(std::move(bytes));
  return request;
}

// Sends a header and its body in legal frames.
template <class Stream, class Request, class Header>
void SendObject(Stream& stream, const Header& header, const std::string& body) {
  Request request;
  *request.mutable_header() = header;
  stream.Write(request);
  constexpr size_t kFrame = size_t{1} << 20;
  for (size_t at = 0; at < body.size(); at += kFrame) {
    stream.Write(FrameOf<Request>(body.substr(at, kFrame)));
  }
}

struct PutObject {
  v1::PutHeader header;
  std::string body;
};
struct PutResult {
  grpc::Status status;
  std::map<uint64_t, v1::PutResponse> answers;
};
PutResult PutAll(v1::KVShrink::Stub& stub, const std::vector<PutObject>& objects);

// Stores layers 0..layers-1 of a chunk from MakeBody(shape, seed + layer) and commits it.
void PutChunk(Daemon& daemon, const std::string& key, uint32_t layers, uint32_t seed,
              const TensorShape& shape = kShape, uint32_t first_token = 0,
              v1::Profile profile = v1::PROFILE_KVS2);
v1::CommitResponse Commit(Daemon& daemon, const std::vector<std::string>& keys);

// True as soon as `condition` holds, false after ten seconds.
bool Eventually(const std::function<bool()>& condition);

}  // namespace kvshrink::service::testing
