#include "fetch.h"

#include <limits>
#include <utility>

#include "kvshrink/client/status.h"
#include "kvshrink/client/values.h"
#include "kvshrink/client/wire.h"

namespace kvshrink::cli {
namespace {

class NoOutput : public FetchOutput {
 public:
  absl::Status Add(size_t, uint32_t, std::string_view) override { return absl::OkStatus(); }
  absl::Status Finish() override { return absl::OkStatus(); }
};

class KvsOutput : public FetchOutput {
 public:
  explicit KvsOutput(client::KvsWriter writer) : writer_(std::move(writer)) {}

  absl::Status Add(size_t, uint32_t, std::string_view body) override {
    return writer_.Append(body);
  }
  absl::Status Finish() override { return writer_.Finish(); }

 private:
  client::KvsWriter writer_;
};

class TraceOutput : public FetchOutput {
 public:
  explicit TraceOutput(client::TraceWriter writer) : writer_(std::move(writer)) {}

  bool wants_values() const override { return true; }
  absl::Status Add(size_t place, uint32_t first_token, std::string_view body) override {
    return writer_.Write(place, first_token, body);
  }
  absl::Status Finish() override { return writer_.Finish(); }

 private:
  client::TraceWriter writer_;
};

void AddEnergies(const ConstTensor& exact, const std::byte* values, DType dtype,
                 double* error_energy, double* energy) {
  const std::vector<float> before = client::ToFloats(exact);
  std::vector<float> after(before.size());
  client::ToFloats(dtype, values, after.size(), after.data());
  for (size_t i = 0; i < before.size(); ++i) {
    const double change = static_cast<double>(after[i]) - static_cast<double>(before[i]);
    *error_energy += change * change;
    *energy += static_cast<double>(before[i]) * static_cast<double>(before[i]);
  }
}

}  // namespace

absl::StatusOr<RunShape> ReadRunShape(const v1::StatResponse& first_chunk, uint32_t chunks,
                                      uint64_t tokens) {
  if (tokens < 1 || tokens > std::numeric_limits<int32_t>::max()) {
    return absl::DataLossError(StrCat("answer field 'tokens' is ", tokens, ": must be 1..2^31-1"));
  }
  if (first_chunk.shards().empty()) {
    return absl::DataLossError("answer field 'shards' is empty: the chunk must have layers");
  }
  RunShape result{chunks, static_cast<uint32_t>(tokens), {}};
  for (const v1::ShardInfo& shard : first_chunk.shards()) {
    if (shard.layer() != result.layers.size()) {
      return absl::DataLossError(StrCat("answer field 'shards.layer' is ", shard.layer(),
                                        ": must be ", result.layers.size()));
    }
    const TensorShape shape{shard.shape().tokens(), shard.shape().kv_heads(),
                            shard.shape().head_dim()};
    const auto dtype = client::FromProto(shard.dtype());
    const absl::Status valid = ValidateShape(shape);
    if (!valid.ok() || !dtype) {
      return absl::DataLossError(StrCat("answer field 'shards' has a bad layer ", shard.layer(),
                                        ": ",
                                        dtype ? std::string(valid.message()) : "unknown dtype"));
    }
    result.layers.push_back({shard.layer(),
                             *dtype,
                             {result.tokens, shape.kv_heads, shape.head_dim},
                             shard.keys_only()});
  }
  return result;
}

std::unique_ptr<FetchOutput> MakeNoOutput() { return std::make_unique<NoOutput>(); }

absl::StatusOr<std::unique_ptr<FetchOutput>> MakeKvsOutput(const std::string& path,
                                                           const RunShape& shape,
                                                           const client::Metadata& metadata,
                                                           bool previews) {
  client::KvsWriter::Contents contents;
  contents.chunks = shape.chunks;
  contents.metadata = metadata;
  contents.previews = previews;
  for (const client::TraceWriter::Layer& layer : shape.layers) {
    contents.layers.push_back(layer.layer);
  }
  KVSHRINK_ASSIGN_OR_RETURN(client::KvsWriter writer,
                            client::KvsWriter::Create(path, std::move(contents)));
  return std::make_unique<KvsOutput>(std::move(writer));
}

absl::StatusOr<std::unique_ptr<FetchOutput>> MakeTraceOutput(const std::string& path,
                                                             const RunShape& shape,
                                                             const client::Metadata& metadata,
                                                             const std::vector<uint32_t>& numbers) {
  std::vector<client::TraceWriter::Layer> layers = shape.layers;
  for (size_t place = 0; place < layers.size(); ++place) {
    layers[place].layer = numbers[place];
  }
  KVSHRINK_ASSIGN_OR_RETURN(client::TraceWriter writer,
                            client::TraceWriter::Create(path, metadata, layers));
  return std::make_unique<TraceOutput>(std::move(writer));
}

void Comparison::Add(const client::TraceLayer& layer, uint32_t first_token, uint32_t tokens,
                     DType dtype, std::string_view values) {
  const auto* data = reinterpret_cast<const std::byte*>(values.data());
  AddEnergies(client::TokenRange(layer.k, first_token, tokens), data, dtype, &k_error_energy,
              &k_energy);
  if (layer.v) {
    AddEnergies(client::TokenRange(*layer.v, first_token, tokens), data + values.size() / 2, dtype,
                &v_error_energy, &v_energy);
  }
}

}  // namespace kvshrink::cli
