#include "tests/unit/service/daemon_fixture.h"

#include <cmath>
#include <cstring>
#include <random>

#include "absl/time/clock.h"
#include "service/observe/log.h"

namespace kvshrink::service::testing {
namespace {

const Backend& LocalBackend() {
  static const std::unique_ptr<Backend> backend = MakeCpuBackend(1);
  return *backend;
}

}  // namespace

Options TestOptions() {
  Options options;
  options.listen = "127.0.0.1:0";
  options.http = "";
  options.backend = "cpu";
  options.threads = 2;
  options.log_level = "off";
  return options;
}

Daemon::Daemon(const Options& options, ServerParts parts) {
  (void)SetUpLog(options.log_level);
  server_ = Server::Start(options, std::move(parts)).value();
  channel_ = grpc::CreateChannel(server_->listen_address(), grpc::InsecureChannelCredentials());
  stub_ = v1::KVShrink::NewStub(channel_);
}

v1::ServerInfoResponse Daemon::Info() {
  grpc::ClientContext context;
  v1::ServerInfoResponse response;
  const grpc::Status status = stub_->ServerInfo(&context, {}, &response);
  return status.ok() ? response : v1::ServerInfoResponse();
}

GatedBackend::GatedBackend(std::shared_ptr<absl::Notification> gate)
    : gate_(std::move(gate)), inner_(MakeCpuBackend(1)) {}

void GatedBackend::AnalyseBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                                 std::span<BlockSpectrum> out) const {
  inner_->AnalyseBlocks(settings, in, out);
}

void GatedBackend::EncodeBlocks(const BlockSettings& settings, std::span<const BlockInput> in,
                                std::span<BlockOutput> out) const {
  gate_->WaitForNotification();
  inner_->EncodeBlocks(settings, in, out);
}

absl::Status GatedBackend::UnpackBlock(Family family, const BlockView& block, uint32_t head_dim,
                                       DecodeForm form, UnpackedBlock* out) const {
  return inner_->UnpackBlock(family, block, head_dim, form, out);
}

absl::Status GatedBackend::DecodeBlock(Family family, const BlockView& block, uint32_t head_dim,
                                       DecodeForm form, float* rows) const {
  return inner_->DecodeBlock(family, block, head_dim, form, rows);
}

std::string MakeBody(const TensorShape& shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> direction(shape.head_dim);
  for (float& x : direction) {
    x = normal(random);
  }
  std::vector<float> values(2 * shape.entries());
  for (size_t row = 0; row < values.size() / shape.head_dim; ++row) {
    const float weight = 2 * normal(random);
    for (size_t i = 0; i < shape.head_dim; ++i) {
      values[row * shape.head_dim + i] = weight * direction[i] + 0.5F * normal(random);
    }
  }
  std::string body(values.size() * sizeof(float), '\0');
  std::memcpy(body.data(), values.data(), body.size());
  return body;
}

std::string Encode(const TensorShape& shape, const std::string& body,
                   const EncodeOptions& options) {
  const std::byte* data = reinterpret_cast<const std::byte*>(body.data());
  const ConstTensor k{data, DType::kFp32, shape, LayoutThd(shape)};
  const ConstTensor v{data + body.size() / 2, DType::kFp32, shape, LayoutThd(shape)};
  return EncodeShard(LocalBackend(), k, v, options).value();
}

std::vector<float> Decode(const std::string& shard, DecodeForm form) {
  const Shard parsed = Shard::Parse(shard, Extent::kAllowPreview).value();
  const TensorShape shape = parsed.header().shape;
  std::vector<float> values(2 * shape.entries());
  std::byte* data = reinterpret_cast<std::byte*>(values.data());
  const size_t half = values.size() * sizeof(float) / 2;
  const absl::Status status =
      DecodeShard(LocalBackend(), parsed, form, {data, DType::kFp32, shape, LayoutThd(shape)},
                  MutableTensor{data + half, DType::kFp32, shape, LayoutThd(shape)});
  return status.ok() ? values : std::vector<float>();
}

v1::ChunkId Id(const std::string& key, const std::string& name_space) {
  v1::ChunkId id;
  id.set_namespace_(name_space);
  id.set_key(key);
  return id;
}

v1::TensorSpec Spec(const TensorShape& shape) {
  v1::TensorSpec spec;
  spec.set_dtype(v1::DTYPE_FP32);
  spec.mutable_shape()->set_tokens(shape.tokens);
  spec.mutable_shape()->set_kv_heads(shape.kv_heads);
  spec.mutable_shape()->set_head_dim(shape.head_dim);
  return spec;
}

v1::PutHeader TensorHeader(uint64_t id, const std::string& key, uint32_t layer, uint32_t layers,
                           const TensorShape& shape) {
  v1::PutHeader header;
  header.set_object_id(id);
  *header.mutable_chunk() = Id(key);
  header.set_layer(layer);
  header.set_layers(layers);
  header.set_body_bytes(2 * shape.entries() * sizeof(float));
  *header.mutable_tensor() = Spec(shape);
  return header;
}

v1::PutHeader ShardHeaderOf(uint64_t id, const std::string& key, uint32_t layer, uint32_t layers,
                            const std::string& shard) {
  v1::PutHeader header = TensorHeader(id, key, layer, layers);
  header.mutable_encoded();
  header.set_body_bytes(shard.size());
  return header;
}

PutResult PutAll(v1::KVShrink::Stub& stub, const std::vector<PutObject>& objects) {
  grpc::ClientContext context;
  auto stream = stub.Put(&context);
  for (const PutObject& object : objects) {
    SendObject<grpc::ClientReaderWriter<v1::PutRequest, v1::PutResponse>, v1::PutRequest>(
        *stream, object.header, object.body);
  }
  stream->WritesDone();
  PutResult result;
  for (v1::PutResponse answer; stream->Read(&answer);) {
    result.answers[answer.object_id()] = answer;
  }
  result.status = stream->Finish();
  return result;
}

void PutChunk(Daemon& daemon, const std::string& key, uint32_t layers, uint32_t seed,
              const TensorShape& shape, uint32_t first_token, v1::Profile profile) {
  std::vector<PutObject> objects;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    v1::PutHeader header = TensorHeader(layer, key, layer, layers, shape);
    header.mutable_encode()->set_first_token(first_token);
    header.mutable_encode()->set_profile(profile);
    objects.push_back({header, MakeBody(shape, seed + layer)});
  }
  const PutResult result = PutAll(daemon.stub(), objects);
  bool fine = result.status.ok() && result.answers.size() == layers;
  for (const auto& [id, answer] : result.answers) {
    fine = fine && answer.status().code() == 0;
  }
  if (!fine || Commit(daemon, {key}).statuses(0).code() != 0) {
    std::fprintf(stderr, "PutChunk of %s failed\n", key.c_str());
    std::abort();
  }
}

v1::CommitResponse Commit(Daemon& daemon, const std::vector<std::string>& keys) {
  grpc::ClientContext context;
  v1::CommitRequest request;
  for (const std::string& key : keys) {
    *request.add_chunks() = Id(key);
  }
  v1::CommitResponse response;
  if (!daemon.stub().Commit(&context, request, &response).ok()) {
    response.Clear();
    response.add_statuses()->set_code(grpc::StatusCode::UNKNOWN);
  }
  return response;
}

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  while (!condition()) {
    if (absl::Now() > deadline) {
      return false;
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

}  // namespace kvshrink::service::testing
