// get: stored chunks to a file, as shards, decoded, or as low-rank previews.
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "fetch.h"
#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/trace_codec.h"
#include "kvshrink/client/wire.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "stored_run.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

struct GetArguments {
  std::string out;
  std::string form = "shard";
  std::string trace;
  std::optional<DType> dtype;
  ServerArguments server;
  PrefixArguments run;
  BackendArguments backend;
  BasisArguments basis;
};

std::string CheckOut(const std::string& path) {
  return EndsWith(path, ".kvs") || EndsWith(path, ".safetensors")
             ? ""
             : StrCat("'", path, "' must end with .kvs or .safetensors");
}

v1::GetForm ToForm(const std::string& name) {
  return name == "decoded"    ? v1::GET_FORM_DECODED
         : name == "low-rank" ? v1::GET_FORM_LOW_RANK
                              : v1::GET_FORM_SHARD;
}

uint64_t RawBytes(const RunShape& shape) {
  uint64_t bytes = 0;
  for (const client::TraceWriter::Layer& layer : shape.layers) {
    bytes += layer.entries() * DTypeBytes(layer.dtype);
  }
  return bytes;
}

struct Totals {
  uint64_t shards = 0;
  uint64_t entries = 0;
  uint64_t values = 0;      // of the entries, those of V
  uint64_t raw_bytes = 0;   // in the original dtype
  uint64_t body_bytes = 0;  // as they came
  uint64_t wire_bytes = 0;
  std::map<std::string, uint64_t> tiers;
};

// Takes the answers of one run of chunks, in order.
class Getter {
 public:
  Getter(const GetArguments& arguments, const RunShape& shape, const client::Trace* trace,
         FetchOutput* output, std::shared_ptr<const Basis> basis)
      : arguments_(arguments),
        shape_(shape),
        trace_(trace),
        output_(output),
        backend_(arguments.backend.Make()),
        basis_(std::move(basis)),
        agreement_(Places(shape)) {}

  absl::Status Add(const client::GotShard& got, const std::string& key) {
    KVSHRINK_RETURN_IF_ERROR(
        client::InContext(StrCat("chunk '", key, "'"), client::ToStatus(got.header.status())));
    const absl::Status status = AddBody(got);
    return status.ok() ? status : client::InContext(StrCat("chunk '", key, "'"), status);
  }

  // All layers of all chunks must have come.
  absl::Status Finish() const {
    const uint64_t expected = uint64_t{shape_.chunks} * shape_.layers.size();
    if (totals_.shards != expected) {
      return absl::DataLossError(
          StrCat("the server gave ", totals_.shards, " of ", expected, " shards"));
    }
    return absl::OkStatus();
  }

  Totals& totals() { return totals_; }
  const Comparison& comparison() const { return comparison_; }

 private:
  static std::vector<uint32_t> Places(const RunShape& shape) {
    std::vector<uint32_t> places;
    for (const auto& layer : shape.layers) {
      places.push_back(layer.layer);
    }
    return places;
  }

  absl::Status AddBody(const client::GotShard& got) {
    const bool decoded = arguments_.form == "decoded";
    std::optional<Shard> shard;
    ShardHeader header;
    if (decoded) {
      KVSHRINK_ASSIGN_OR_RETURN(header, HeaderOf(got.header.shard()));
    } else {
      const Extent extent = arguments_.form == "low-rank" ? Extent::kAllowPreview : Extent::kWhole;
      KVSHRINK_ASSIGN_OR_RETURN(shard, Shard::Parse(got.body, extent));
      header = shard->header();
    }
    KVSHRINK_RETURN_IF_ERROR(agreement_.Add(header));
    const size_t place = header.layer;
    if (totals_.shards == 0) {
      first_token_ = header.first_token;
    }
    const uint32_t first = header.first_token - first_token_;
    const client::TraceWriter::Layer& layer = shape_.layers[place];
    if (layer.shape.kv_heads != header.shape.kv_heads ||
        layer.shape.head_dim != header.shape.head_dim || layer.keys_only != header.keys_only ||
        first > shape_.tokens || header.shape.tokens > shape_.tokens - first) {
      return BadShard("shape", "another one than Stat and Lookup gave", "they must agree");
    }
    const DType dtype = arguments_.dtype.value_or(header.dtype);
    std::string_view body = got.body;
    std::string values;
    if (decoded) {
      KVSHRINK_RETURN_IF_ERROR(CheckBody(got, header, dtype));
    } else if (output_->wants_values() || trace_ != nullptr) {
      const DecodeForm form =
          arguments_.form == "low-rank" ? DecodeForm::kLowRank : DecodeForm::kFull;
      KVSHRINK_ASSIGN_OR_RETURN(
          values, client::DecodeToBytes(*backend_, *shard, form, dtype, basis_.get()));
      body = output_->wants_values() ? std::string_view(values) : body;
    }
    if (trace_ != nullptr) {
      comparison_.Add(trace_->layers()[place], first, header.shape.tokens, dtype,
                      decoded ? std::string_view(got.body) : std::string_view(values));
    }
    Count(got, header);
    return output_->Add(place, first, body);
  }

  static absl::StatusOr<ShardHeader> HeaderOf(const v1::ShardInfo& info) {
    ShardHeader header;
    const auto dtype = client::FromProto(info.dtype());
    if (!dtype) {
      return BadShard("dtype", static_cast<int>(info.dtype()), "unknown");
    }
    header.dtype = *dtype;
    header.shape = {info.shape().tokens(), info.shape().kv_heads(), info.shape().head_dim()};
    header.first_token = info.first_token();
    header.layer = info.layer();
    header.keys_only = info.keys_only();
    const absl::Status valid = ValidateShape(header.shape);
    if (!valid.ok()) {
      return absl::DataLossError(valid.message());
    }
    return header;
  }

  static absl::Status CheckBody(const client::GotShard& got, const ShardHeader& header,
                                DType dtype) {
    if (got.header.tensor().dtype() != client::ToProto(dtype)) {
      return BadShard("tensor.dtype", static_cast<int>(got.header.tensor().dtype()),
                      StrCat("must be ", DTypeName(dtype)));
    }
    const size_t expected = header.entries() * DTypeBytes(dtype);
    if (got.body.size() != expected) {
      return BadShard("body_bytes", got.body.size(), StrCat("must be ", expected));
    }
    return absl::OkStatus();
  }

  void Count(const client::GotShard& got, const ShardHeader& header) {
    ++totals_.shards;
    totals_.entries += header.entries();
    totals_.values += header.keys_only ? 0 : header.shape.entries();
    totals_.raw_bytes += header.raw_bytes();
    totals_.body_bytes += got.body.size();
    ++totals_.tiers[std::string(client::TierName(got.header.tier()))];
  }

  const GetArguments& arguments_;
  const RunShape& shape_;
  const client::Trace* trace_;
  FetchOutput* output_;
  std::unique_ptr<Backend> backend_;
  std::shared_ptr<const Basis> basis_;
  client::KvsAgreement agreement_;
  uint32_t first_token_ = 0;
  Totals totals_;
  Comparison comparison_;
};

// A trace to compare with must be the run's.
absl::Status CheckTrace(const client::Trace& trace, const RunShape& shape) {
  if (trace.layers().size() != shape.layers.size()) {
    return BadArgument("trace", StrCat("one of ", trace.layers().size(), " layers"),
                       StrCat("the stored run has ", shape.layers.size()));
  }
  if (trace.tokens() != shape.tokens) {
    return BadArgument("trace", StrCat("one of ", trace.tokens(), " tokens"),
                       StrCat("the stored run has ", shape.tokens));
  }
  for (size_t place = 0; place < shape.layers.size(); ++place) {
    const client::TraceLayer& layer = trace.layers()[place];
    if (layer.k.shape != shape.layers[place].shape ||
        layer.v.has_value() == shape.layers[place].keys_only) {
      return BadArgument("trace", StrCat("of another shape in layer ", layer.layer),
                         "must be the run's");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<FetchOutput>> MakeOutput(const GetArguments& arguments,
                                                        RunShape shape,
                                                        const client::Trace* trace) {
  client::Metadata metadata = {{"namespace", arguments.run.name_space},
                               {"prefix", arguments.run.prefix}};
  std::vector<uint32_t> numbers;
  for (size_t place = 0; place < shape.layers.size(); ++place) {
    client::TraceWriter::Layer& layer = shape.layers[place];
    numbers.push_back(trace != nullptr ? trace->layers()[place].layer : layer.layer);
    layer.dtype = arguments.dtype.value_or(layer.dtype);
  }
  if (trace != nullptr) {
    for (const auto& [key, value] : client::WithoutQueries(trace->metadata())) {
      metadata.emplace(key, value);
    }
  }
  if (arguments.out.empty()) {
    return MakeNoOutput();
  }
  if (EndsWith(arguments.out, ".kvs")) {
    metadata.erase("raw_tokens");  // what the shards were coded with is theirs to say
    return MakeKvsOutput(arguments.out, shape, metadata, arguments.form == "low-rank");
  }
  return MakeTraceOutput(arguments.out, shape, metadata, numbers);
}

Outcome Describe(const GetArguments& arguments, const RunShape& shape, const Totals& totals,
                 const Comparison* comparison, double seconds) {
  const double mb_per_s = MbPerSecond(2 * totals.entries, seconds);
  std::string tiers;
  for (const auto& [tier, count] : totals.tiers) {
    tiers += StrCat(tiers.empty() ? "" : ", ", tier, " ", count);
  }
  Outcome outcome;
  outcome.object = {{"namespace", arguments.run.name_space},
                    {"prefix", arguments.run.prefix},
                    {"form", arguments.form},
                    {"out", arguments.out.empty() ? Json(nullptr) : Json(arguments.out)},
                    {"chunks", shape.chunks},
                    {"layers", shape.layers.size()},
                    {"tokens", shape.tokens},
                    {"shards", totals.shards},
                    {"tiers", totals.tiers},
                    {"raw_bytes", totals.raw_bytes},
                    {"body_bytes", totals.body_bytes},
                    {"wire_bytes", totals.wire_bytes},
                    {"seconds", seconds},
                    {"mb_per_s", mb_per_s}};
  std::vector<std::pair<std::string, std::string>> facts = {
      {"chunks x layers",
       StrCat(shape.chunks, " x ", shape.layers.size(), " of ", shape.tokens, " tokens")},
      {"form", arguments.form},
      {"tier", tiers},
      {"raw", Bytes(totals.raw_bytes)},
      {"on the wire", Bytes(totals.wire_bytes)},
      {"speed", StrCat(Fixed(mb_per_s, 1), " MB/s of raw tensors")}};
  if (comparison != nullptr) {
    const double k =
        comparison->k_energy > 0 ? comparison->k_error_energy / comparison->k_energy : 0;
    const double v =
        comparison->v_energy > 0 ? comparison->v_error_energy / comparison->v_energy : 0;
    outcome.object["rel_mse_k"] = k;
    outcome.object["rel_mse_v"] = OrNull(totals.values > 0, v);
    facts.emplace_back("K error", Short(k));
    facts.emplace_back("V error", OrDash(totals.values > 0, v));
  }
  if (!arguments.out.empty()) {
    facts.emplace_back("file", arguments.out);
  }
  outcome.text = Facts(facts);
  return outcome;
}

absl::StatusOr<Outcome> RunGet(const GetArguments& arguments) {
  std::optional<client::Trace> trace;
  if (!arguments.trace.empty()) {
    KVSHRINK_ASSIGN_OR_RETURN(trace, client::Trace::Open(arguments.trace));
  }
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  KVSHRINK_ASSIGN_OR_RETURN(
      const StoredRun run,
      StoredRun::Require(remote.get(), arguments.run.name_space, arguments.run.prefix));
  KVSHRINK_ASSIGN_OR_RETURN(const v1::StatResponse first,
                            remote->Stat(arguments.run.name_space, run.keys()[0]));
  KVSHRINK_ASSIGN_OR_RETURN(
      const RunShape shape,
      ReadRunShape(first, static_cast<uint32_t>(run.keys().size()), run.tokens()));
  const client::Trace* compared = trace ? &*trace : nullptr;
  if (compared != nullptr) {
    KVSHRINK_RETURN_IF_ERROR(CheckTrace(*compared, shape));
  }
  KVSHRINK_ASSIGN_OR_RETURN(const std::unique_ptr<FetchOutput> output,
                            MakeOutput(arguments, shape, compared));
  KVSHRINK_ASSIGN_OR_RETURN(auto basis, arguments.basis.Open());
  Getter getter(arguments, shape, compared, output.get(), std::move(basis));
  client::GetQuery query{arguments.run.name_space, run.keys(), {}, ToForm(arguments.form), {}};
  if (arguments.form == "decoded" && arguments.dtype) {
    query.dtype = client::ToProto(*arguments.dtype);
  }
  Progress progress("get", RawBytes(shape));
  const auto start = std::chrono::steady_clock::now();
  KVSHRINK_RETURN_IF_ERROR(remote->Get(
      query,
      [&](const client::GotShard& got) {
        progress.Update(getter.totals().raw_bytes);
        return getter.Add(got, run.keys()[got.chunk]);
      },
      &getter.totals().wire_bytes));
  KVSHRINK_RETURN_IF_ERROR(getter.Finish());
  KVSHRINK_RETURN_IF_ERROR(output->Finish());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return Describe(arguments, shape, getter.totals(),
                  compared != nullptr ? &getter.comparison() : nullptr, elapsed.count());
}

}  // namespace

void AddGetCommand(Program* program) {
  const auto arguments = std::make_shared<GetArguments>();
  CLI::App* command = program->AddCommand("get", "fetch a stored run of chunks",
                                          [arguments] { return RunGet(*arguments); });
  command
      ->add_option("--out", arguments->out,
                   "file to write: .kvs, or .safetensors with decoded tensors")
      ->check(CLI::Validator(CheckOut, "FILE"));
  command
      ->add_option("--form", arguments->form,
                   "what travels: shard, decoded, or low-rank (a preview)")
      ->capture_default_str()
      ->check(CLI::IsMember({"shard", "decoded", "low-rank"}));
  command->add_option("--trace", arguments->trace,
                      "compare with this trace; its layer numbers and metadata name the output's");
  AddDtype(command, &arguments->dtype, "of decoded tensors (default: the original's)");
  arguments->server.Add(command);
  arguments->run.Add(command, true);
  arguments->basis.Add(command, "calibrated basis (.kvb) of kvs2c shards that are decoded here");
  arguments->backend.AddThreads(command);
  command->parse_complete_callback([arguments] {
    if (arguments->form == "decoded" && EndsWith(arguments->out, ".kvs")) {
      throw CLI::ValidationError("--out", "--form decoded needs a .safetensors file");
    }
  });
}

}  // namespace kvshrink::cli
