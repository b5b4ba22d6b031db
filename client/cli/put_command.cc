// put: a trace to a server, chunk by chunk, layer by layer.
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "kvshrink/client/chunk_keys.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/values.h"
#include "kvshrink/client/wire.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

struct PutArguments {
  std::string trace;
  std::string encode_at = "client";
  ServerArguments server;
  PrefixArguments run;
  CodingArguments coding;
  BasisArguments basis;
  BackendArguments backend;
};

// Relative error of K or V over many shards, each weighted with its energy.
struct WeightedError {
  double error_energy = 0;
  double energy = 0;

  void Add(double relative_error, double shard_energy) {
    error_energy += relative_error * shard_energy;
    energy += shard_energy;
  }
  double relative_error() const { return energy > 0 ? error_energy / energy : 0; }
};

struct Totals {
  uint64_t raw_bytes = 0;
  uint64_t entries = 0;
  uint64_t values = 0;  // of the entries, those of V
  uint64_t encoded_bytes = 0;
  uint64_t already_present = 0;
  uint64_t raw_blocks = 0;
  uint64_t escalated_blocks = 0;
  WeightedError k, v;
  uint64_t objects = 0;
  absl::Status first_error;
  uint64_t errors = 0;
};

// Sum of squares of the rows that are coded.
double CodedEnergy(const ConstTensor& tensor, uint32_t raw_rows) {
  double energy = 0;
  if (raw_rows < tensor.shape.tokens) {
    const ConstTensor coded = client::TokenRange(tensor, raw_rows, tensor.shape.tokens - raw_rows);
    for (const float value : client::ToFloats(coded)) {
      energy += static_cast<double>(value) * static_cast<double>(value);
    }
  }
  return energy;
}

class Putter {
 public:
  Putter(const PutArguments& arguments, const client::Trace& trace, client::Remote* remote)
      : arguments_(arguments),
        trace_(trace),
        settings_(arguments.coding.settings),
        progress_("put", trace.raw_bytes()),
        stream_(remote->Put([this](const client::PutObject& object, const v1::PutResponse& answer) {
          TakeAnswer(object, answer);
        })) {}

  absl::Status Run() {
    KVSHRINK_RETURN_IF_ERROR(arguments_.encode_at == "client" ? SendShards() : SendTensors());
    return stream_->Finish();
  }

  const Totals& totals() const { return totals_; }
  uint64_t wire_bytes() const { return stream_->wire_bytes(); }
  uint64_t resent_objects() const { return stream_->resent_objects(); }

 private:
  client::PutObject MakeObject(uint32_t chunk, size_t place) const {
    client::PutObject object;
    object.header.mutable_chunk()->set_namespace_(arguments_.run.name_space);
    object.header.mutable_chunk()->set_key(client::ChunkKey(arguments_.run.prefix, chunk));
    object.header.set_layer(static_cast<uint32_t>(place));
    object.header.set_layers(static_cast<uint32_t>(trace_.layers().size()));
    return object;
  }

  absl::Status SendShards() {
    const auto backend = arguments_.backend.Make();
    return client::EncodeTrace(
        *backend, trace_, settings_, client::LayerNumbers::kByPlace,
        [&](client::CodedShard coded) -> absl::Status {
          client::PutObject object = MakeObject(coded.chunk, coded.place);
          object.header.mutable_encoded();
          object.owned = std::make_shared<const std::string>(std::move(coded.bytes));
          object.parts = {*object.owned};
          totals_.raw_bytes += coded.report.raw_bytes;
          totals_.entries += coded.report.entries();
          totals_.values += coded.report.v.entries;
          totals_.raw_blocks += coded.report.k.raw_blocks + coded.report.v.raw_blocks;
          totals_.escalated_blocks +=
              coded.report.k.escalated_blocks + coded.report.v.escalated_blocks;
          totals_.k.Add(coded.report.k.relative_error(), coded.report.k.energy);
          totals_.v.Add(coded.report.v.relative_error(), coded.report.v.energy);
          return Send(std::move(object));
        });
  }

  absl::Status SendTensors() {
    const std::vector<client::TokenSpan> chunks =
        client::ChunksOf(trace_.tokens(), settings_.chunk_tokens);
    for (uint32_t chunk = 0; chunk < chunks.size(); ++chunk) {
      for (size_t place = 0; place < trace_.layers().size(); ++place) {
        const client::TraceLayer& layer = trace_.layers()[place];
        KVSHRINK_RETURN_IF_ERROR(SendTensor(chunk, place, layer, chunks[chunk]));
      }
    }
    return absl::OkStatus();
  }

  absl::Status SendTensor(uint32_t chunk, size_t place, const client::TraceLayer& layer,
                          const client::TokenSpan& span) {
    const ConstTensor k = client::TokenRange(layer.k, span.first_token, span.tokens);
    const std::optional<ConstTensor> v = client::TokenRange(layer.v, span.first_token, span.tokens);
    client::PutObject object = MakeObject(chunk, place);
    v1::TensorSpec* spec = object.header.mutable_tensor();
    spec->set_dtype(client::ToProto(k.dtype));
    spec->mutable_shape()->set_tokens(k.shape.tokens);
    spec->mutable_shape()->set_kv_heads(k.shape.kv_heads);
    spec->mutable_shape()->set_head_dim(k.shape.head_dim);
    spec->set_keys_only(!v.has_value());
    v1::EncodeSpec* encode = object.header.mutable_encode();
    const bool raw = client::IsRawLayer(settings_, place, trace_.layers().size());
    encode->set_profile(client::ToProto(raw ? Profile::kRaw : settings_.profile));
    encode->set_max_relative_error(settings_.max_relative_error);
    encode->set_bits_per_entry(raw ? 0 : settings_.bits_per_entry);
    encode->set_fixed_size(settings_.fixed_size && !raw);
    encode->set_raw_tokens(client::RawTokens(settings_, trace_));
    encode->set_first_token(span.first_token);
    if (const auto rope = client::RopesOf(settings_, trace_).Of(layer.layer)) {
      *encode->mutable_rope() = client::ToProto(*rope);
    }
    const size_t bytes = k.shape.entries() * DTypeBytes(k.dtype);
    object.parts.emplace_back(reinterpret_cast<const char*>(k.data), bytes);
    if (v) {
      object.parts.emplace_back(reinterpret_cast<const char*>(v->data), bytes);
    }
    totals_.raw_bytes += object.body_bytes();
    totals_.entries += k.shape.entries() * object.parts.size();
    totals_.values += v ? k.shape.entries() : 0;
    return Send(std::move(object));
  }

  absl::Status Send(client::PutObject object) {
    progress_.Update(totals_.raw_bytes);
    return stream_->Send(std::move(object));
  }

  void TakeAnswer(const client::PutObject& object, const v1::PutResponse& answer) {
    ++totals_.objects;
    if (const absl::Status status = client::ToStatus(answer.status()); !status.ok()) {
      ++totals_.errors;
      if (totals_.first_error.ok()) {
        totals_.first_error = client::InContext(
            StrCat("chunk '", object.header.chunk().key(), "', layer ", object.header.layer()),
            status);
      }
      return;
    }
    totals_.already_present += answer.already_present() ? 1 : 0;
    totals_.encoded_bytes += answer.stats().encoded_bytes();
    if (object.header.has_tensor()) {
      AddServerStats(object, answer.stats());
    }
  }

  // The server's errors are relative: the trace gives the energies to weigh them with.
  void AddServerStats(const client::PutObject& object, const v1::ShardStats& stats) {
    const client::TraceLayer& layer = trace_.layers()[object.header.layer()];
    const uint32_t first = object.header.encode().first_token();
    const uint32_t tokens = object.header.tensor().shape().tokens();
    const uint32_t raw_tokens = object.header.encode().raw_tokens();
    const uint32_t raw_rows = raw_tokens > first ? raw_tokens - first : 0;
    totals_.k.Add(stats.k().relative_error(),
                  CodedEnergy(client::TokenRange(layer.k, first, tokens), raw_rows));
    if (layer.v) {
      totals_.v.Add(stats.v().relative_error(),
                    CodedEnergy(client::TokenRange(*layer.v, first, tokens), raw_rows));
    }
    totals_.raw_blocks += stats.k().raw_blocks() + stats.v().raw_blocks();
    totals_.escalated_blocks += stats.k().escalated_blocks() + stats.v().escalated_blocks();
  }

  const PutArguments& arguments_;
  const client::Trace& trace_;
  const client::CodingSettings& settings_;
  Progress progress_;
  Totals totals_;
  std::unique_ptr<client::PutStream> stream_;  // last: its end calls back
};

absl::Status CommitRun(client::Remote* remote, const std::string& name_space,
                       const std::vector<std::string>& keys) {
  KVSHRINK_ASSIGN_OR_RETURN(const std::vector<absl::Status> statuses,
                            remote->Commit(name_space, keys));
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!statuses[i].ok()) {
      return client::InContext(StrCat("commit of chunk '", keys[i], "'"), statuses[i]);
    }
  }
  return absl::OkStatus();
}

Outcome Describe(const PutArguments& arguments, const client::Trace& trace, size_t chunks,
                 const Putter& putter, double seconds) {
  const Totals& totals = putter.totals();
  const std::string_view profile = GetProfileInfo(arguments.coding.settings.profile).name;
  const double bits = totals.entries > 0 ? 8 * static_cast<double>(totals.encoded_bytes) /
                                               static_cast<double>(totals.entries)
                                         : 0;
  const double mb_per_s = MbPerSecond(2 * totals.entries, seconds);
  Outcome outcome;
  outcome.object = {{"trace", arguments.trace},
                    {"namespace", arguments.run.name_space},
                    {"prefix", arguments.run.prefix},
                    {"profile", profile},
                    {"rope", client::RopesOf(arguments.coding.settings, trace).Text()},
                    {"raw_layers", arguments.coding.settings.raw_layers},
                    {"encode_at", arguments.encode_at},
                    {"chunks", chunks},
                    {"layers", trace.layers().size()},
                    {"tokens", trace.tokens()},
                    {"shards", totals.objects},
                    {"already_present", totals.already_present},
                    {"resent", putter.resent_objects()},
                    {"bits_per_entry", bits},
                    {"rel_mse_k", totals.k.relative_error()},
                    {"rel_mse_v", OrNull(totals.values > 0, totals.v.relative_error())},
                    {"raw_blocks", totals.raw_blocks},
                    {"escalated_blocks", totals.escalated_blocks},
                    {"raw_bytes", totals.raw_bytes},
                    {"encoded_bytes", totals.encoded_bytes},
                    {"wire_bytes", putter.wire_bytes()},
                    {"seconds", seconds},
                    {"mb_per_s", mb_per_s}};
  outcome.text = Facts(
      {{"chunks x layers", StrCat(chunks, " x ", trace.layers().size(), " of ", trace.tokens(),
                                  " tokens, ", totals.already_present, " shards there before")},
       {"profile", StrCat(profile, ", coded by the ", arguments.encode_at)},
       {"bits per entry", Fixed(bits, 3)},
       {"K error", Short(totals.k.relative_error())},
       {"V error", OrDash(totals.values > 0, totals.v.relative_error())},
       {"raw", Bytes(totals.raw_bytes)},
       {"stored", Bytes(totals.encoded_bytes)},
       {"on the wire", Bytes(putter.wire_bytes())},
       {"speed", StrCat(Fixed(mb_per_s, 1), " MB/s of raw tensors")}});
  return outcome;
}

absl::StatusOr<Outcome> RunPut(PutArguments arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(arguments.coding.settings.basis, arguments.basis.Open());
  KVSHRINK_ASSIGN_OR_RETURN(const client::Trace trace, client::Trace::Open(arguments.trace));
  KVSHRINK_RETURN_IF_ERROR(arguments.coding.rope.Check(trace));
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  const size_t chunks =
      client::ChunksOf(trace.tokens(), arguments.coding.settings.chunk_tokens).size();
  const auto start = std::chrono::steady_clock::now();
  Putter putter(arguments, trace, remote.get());
  KVSHRINK_RETURN_IF_ERROR(putter.Run());
  const Totals& totals = putter.totals();
  if (totals.errors > 0) {
    return client::InContext(
        StrCat(totals.errors, " of ", totals.objects, " shards were refused; the first"),
        totals.first_error);
  }
  KVSHRINK_RETURN_IF_ERROR(
      CommitRun(remote.get(), arguments.run.name_space,
                client::ChunkKeys(arguments.run.prefix, static_cast<uint32_t>(chunks))));
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return Describe(arguments, trace, chunks, putter, elapsed.count());
}

}  // namespace

void AddPutCommand(Program* program) {
  const auto arguments = std::make_shared<PutArguments>();
  CLI::App* command = program->AddCommand("put", "store a trace as chunks and commit them",
                                          [arguments] { return RunPut(*arguments); });
  command->add_option("TRACE", arguments->trace, "safetensors file")->required();
  command
      ->add_option("--encode-at", arguments->encode_at,
                   "client: only shards travel; server: raw tensors do")
      ->capture_default_str()
      ->check(CLI::IsMember({"client", "server"}));
  arguments->server.Add(command);
  arguments->run.Add(command, true);
  arguments->coding.AddProfile(command);
  arguments->coding.Add(command);
  arguments->basis.Add(command,
                       "with --encode-at client: calibrated basis (.kvb) of profile kvs2c");
  arguments->backend.AddThreads(command);
}

}  // namespace kvshrink::cli
