// attend: a trace's queries against its stored keys and values, and how far the answers are from
// exact attention.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kvshrink/client/attention_metrics.h"
#include "kvshrink/client/evaluate.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/values.h"
#include "kvshrink/client/wire.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "stored_run.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

constexpr size_t kMaxChunks = 4096;  // of one Attend

struct AttendArguments {
  std::string trace;
  std::string mode = "output";
  uint32_t top_k = 0;
  std::vector<uint32_t> layers;  // as in the trace; empty = all with queries
  std::string out;
  ServerArguments server;
  PrefixArguments run;
  BackendArguments backend;

  bool scores() const { return mode == "scores"; }
};

// How far an answer is from exact attention.
struct LayerResult {
  uint32_t layer = 0;
  uint32_t queries = 0;
  uint32_t q_heads = 0;
  double error_energy = 0;  // of outputs, or of logits
  double energy = 0;        // of exact outputs
  uint64_t compared = 0;    // logits
  uint64_t top_found = 0;   // of the answer's top k that are in the exact top k
  uint64_t top_asked = 0;
  uint64_t wire_bytes = 0;
  double seconds = 0;

  void Add(const LayerResult& other) {
    error_energy += other.error_energy;
    energy += other.energy;
    compared += other.compared;
    top_found += other.top_found;
    top_asked += other.top_asked;
    wire_bytes += other.wire_bytes;
    seconds += other.seconds;
  }
  double output_error() const { return energy > 0 ? error_energy / energy : 0; }
  double logit_rmse() const {
    return compared > 0 ? std::sqrt(error_energy / static_cast<double>(compared)) : 0;
  }
  double recall() const {
    return top_asked > 0 ? static_cast<double>(top_found) / static_cast<double>(top_asked) : 0;
  }
};

template <typename Number>
std::vector<Number> Numbers(std::string_view bytes) {
  std::vector<Number> numbers(bytes.size() / sizeof(Number));
  std::memcpy(numbers.data(), bytes.data(), numbers.size() * sizeof(Number));
  return numbers;
}

void CompareOutput(const client::ExactAttention& exact, std::string_view body,
                   LayerResult* result) {
  const std::vector<float> values = Numbers<float>(body);
  for (size_t i = 0; i < exact.output.size(); ++i) {
    const double change = static_cast<double>(values[i]) - exact.output[i];
    result->error_energy += change * change;
    result->energy += exact.output[i] * exact.output[i];
  }
}

// One logit that the server gave; both say -inf where the query doesn't see the key.
absl::Status CompareLogit(double exact, float given, LayerResult* result) {
  const bool visible = std::isfinite(exact);
  if (visible != (given != -std::numeric_limits<float>::infinity())) {
    return absl::DataLossError(
        StrCat("answer field 'logit' is ", given, ": exact attention gives ", exact));
  }
  if (visible) {
    const double change = static_cast<double>(given) - exact;
    result->error_energy += change * change;
    ++result->compared;
  }
  return absl::OkStatus();
}

absl::Status CompareLogits(const client::ExactAttention& exact, std::string_view body,
                           LayerResult* result) {
  const std::vector<float> values = Numbers<float>(body);
  for (size_t i = 0; i < values.size(); ++i) {
    KVSHRINK_RETURN_IF_ERROR(CompareLogit(exact.logits[i], values[i], result));
  }
  return absl::OkStatus();
}

absl::Status CompareTop(const client::ExactAttention& exact, std::string_view body, size_t tokens,
                        size_t top_k, LayerResult* result) {
  const std::vector<float> values = Numbers<float>(body.substr(0, body.size() / 2));
  const std::vector<uint32_t> indices = Numbers<uint32_t>(body.substr(body.size() / 2));
  std::vector<double> sorted(tokens);
  for (size_t row = 0; row < exact.logits.size() / tokens; ++row) {
    const double* logits = exact.logits.data() + row * tokens;
    std::copy(logits, logits + tokens, sorted.begin());
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<ptrdiff_t>(top_k - 1),
                     sorted.end(), std::greater<>());
    const double least = sorted[top_k - 1];
    for (size_t i = row * top_k; i < (row + 1) * top_k; ++i) {
      if (indices[i] >= tokens) {
        return absl::DataLossError(
            StrCat("answer field 'index' is ", indices[i], ": there are ", tokens, " tokens"));
      }
      KVSHRINK_RETURN_IF_ERROR(CompareLogit(logits[indices[i]], values[i], result));
      result->top_found += logits[indices[i]] >= least ? 1 : 0;
      ++result->top_asked;
    }
  }
  return absl::OkStatus();
}

v1::AttendHeader MakeHeader(const AttendArguments& arguments, const client::Trace& trace,
                            size_t place, const StoredRun& run) {
  const client::TraceLayer& layer = trace.layers()[place];
  v1::AttendHeader header;
  for (const std::string& key : run.keys()) {
    v1::ChunkId* chunk = header.add_chunks();
    chunk->set_namespace_(arguments.run.name_space);
    chunk->set_key(key);
  }
  header.set_layer(static_cast<uint32_t>(place));
  header.set_mode(arguments.scores() ? v1::ATTEND_MODE_SCORES : v1::ATTEND_MODE_OUTPUT);
  header.set_queries(layer.q->tokens);
  header.set_q_heads(layer.q->q_heads);
  header.set_head_dim(layer.k.shape.head_dim);
  header.set_dtype(client::ToProto(layer.q->dtype));
  header.set_scale(client::SoftmaxScale(trace, layer));
  header.set_first_query(trace.tokens() - layer.q->tokens);
  header.set_top_k(arguments.scores() ? arguments.top_k : 0);
  return header;
}

struct Answered {
  LayerResult result;
  client::AttendResult answer;
};

absl::StatusOr<Answered> AttendLayer(const AttendArguments& arguments, client::Remote* remote,
                                     const client::Trace& trace, size_t place,
                                     const StoredRun& run) {
  const client::TraceLayer& layer = trace.layers()[place];
  const client::TraceQueries& q = *layer.q;
  const size_t body_bytes =
      size_t{q.tokens} * q.q_heads * layer.k.shape.head_dim * DTypeBytes(q.dtype);
  const std::string_view body(reinterpret_cast<const char*>(q.data), body_bytes);
  const auto start = std::chrono::steady_clock::now();
  KVSHRINK_ASSIGN_OR_RETURN(client::AttendResult answer,
                            remote->Attend(MakeHeader(arguments, trace, place, run), body));
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  if (answer.answer.tokens() != trace.tokens()) {
    return absl::DataLossError(
        StrCat("answer field 'tokens' is ", answer.answer.tokens(), ": must be ", trace.tokens()));
  }
  const std::vector<float> k = client::ToFloats(layer.k);
  const std::vector<float> v = layer.v ? client::ToFloats(*layer.v) : std::vector<float>();
  std::vector<float> floats;
  const client::Queries queries = client::QueriesOf(layer, &floats);
  KVSHRINK_ASSIGN_OR_RETURN(
      const client::ExactAttention exact,
      client::ComputeAttention({layer.k.shape, k, v}, queries, client::SoftmaxScale(trace, layer),
                               arguments.backend.threads));
  LayerResult result;
  result.layer = layer.layer;
  result.queries = q.tokens;
  result.q_heads = q.q_heads;
  result.wire_bytes = answer.wire_bytes;
  result.seconds = elapsed.count();
  if (!arguments.scores()) {
    CompareOutput(exact, answer.body, &result);
  } else if (arguments.top_k == 0) {
    KVSHRINK_RETURN_IF_ERROR(CompareLogits(exact, answer.body, &result));
  } else {
    KVSHRINK_RETURN_IF_ERROR(
        CompareTop(exact, answer.body, trace.tokens(), answer.answer.top_k(), &result));
  }
  return Answered{result, std::move(answer)};
}

// Writes the answers as tensors: layer.{i}.output and .lse, .logits, or .top_logits and
// .top_tokens.
class AnswerFile {
 public:
  explicit AnswerFile(const AttendArguments& arguments) : arguments_(arguments) {}

  void Add(const client::TraceLayer& layer, const client::AttendResult& answer) {
    const std::string name = StrCat("layer.", layer.layer, ".");
    const uint64_t queries = layer.q->tokens;
    const uint64_t heads = layer.q->q_heads;
    const uint64_t top_k = answer.answer.top_k();
    if (!arguments_.scores()) {
      tensors_.push_back({name + "output", "F32", {queries, heads, layer.k.shape.head_dim}});
      tensors_.push_back({name + "lse", "F32", {queries, heads}});
    } else if (arguments_.top_k == 0) {
      tensors_.push_back({name + "logits", "F32", {queries, heads, answer.answer.tokens()}});
    } else {
      tensors_.push_back({name + "top_logits", "F32", {queries, heads, top_k}});
      tensors_.push_back({name + "top_tokens", "U32", {queries, heads, top_k}});
    }
    data_ += answer.body;
  }

  // The tensors' bytes lie one after the other, as in the answers.
  absl::Status Write() {
    KVSHRINK_ASSIGN_OR_RETURN(
        client::SafetensorsWriter writer,
        client::SafetensorsWriter::Create(arguments_.out, {{"mode", arguments_.mode}}, tensors_));
    std::string_view rest = data_;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      uint64_t bytes = client::SafetensorsDtypeBytes(tensors_[i].dtype);
      for (const uint64_t size : tensors_[i].shape) {
        bytes *= size;
      }
      KVSHRINK_RETURN_IF_ERROR(writer.Write(i, 0, rest.substr(0, bytes)));
      rest.remove_prefix(bytes);
    }
    return writer.Finish();
  }

 private:
  const AttendArguments& arguments_;
  std::vector<client::SafetensorsWriter::Tensor> tensors_;
  std::string data_;
};

Json ToJson(const AttendArguments& arguments, const LayerResult& result) {
  Json object = Json::object();
  if (!arguments.scores()) {
    object["attention_rel_error"] = result.output_error();
  } else {
    object["logit_rmse"] = result.logit_rmse();
    if (arguments.top_k > 0) {
      object["top_k_recall"] = result.recall();
    }
  }
  object["wire_bytes"] = result.wire_bytes;
  object["seconds"] = result.seconds;
  return object;
}

std::vector<std::string> ToRow(const AttendArguments& arguments, const std::string& name,
                               const LayerResult& result) {
  return {name, arguments.scores() ? Short(result.logit_rmse()) : Short(result.output_error()),
          arguments.scores() && arguments.top_k > 0 ? Fixed(result.recall(), 3) : "-",
          Bytes(result.wire_bytes), Fixed(result.seconds * 1e3, 1)};
}

// Places of the layers asked for.
absl::StatusOr<std::vector<size_t>> SelectLayers(const AttendArguments& arguments,
                                                 const client::Trace& trace) {
  std::vector<size_t> places;
  for (size_t place = 0; place < trace.layers().size(); ++place) {
    const client::TraceLayer& layer = trace.layers()[place];
    const auto& wanted = arguments.layers;
    if (layer.q &&
        (wanted.empty() || std::find(wanted.begin(), wanted.end(), layer.layer) != wanted.end())) {
      places.push_back(place);
    }
  }
  for (const uint32_t number : arguments.layers) {
    const client::TraceLayer* layer = trace.layer(number);
    if (layer == nullptr || !layer->q) {
      return BadArgument("layer", number, "the trace has no queries of such a layer");
    }
  }
  if (places.empty()) {
    return BadArgument("trace", arguments.trace, "it has no queries (layer.{i}.q)");
  }
  return places;
}

absl::Status CheckRun(const StoredRun& run, const client::Trace& trace) {
  if (run.keys().size() > kMaxChunks) {
    return BadArgument("chunks", run.keys().size(), StrCat("must be at most ", kMaxChunks));
  }
  if (run.tokens() != trace.tokens()) {
    return absl::FailedPreconditionError(StrCat("the stored run has ", run.tokens(),
                                                " tokens, the trace ", trace.tokens(),
                                                ": they must be the same"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Outcome> RunAttend(const AttendArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const client::Trace trace, client::Trace::Open(arguments.trace));
  KVSHRINK_ASSIGN_OR_RETURN(const std::vector<size_t> places, SelectLayers(arguments, trace));
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  KVSHRINK_ASSIGN_OR_RETURN(
      const StoredRun run,
      StoredRun::Require(remote.get(), arguments.run.name_space, arguments.run.prefix));
  KVSHRINK_RETURN_IF_ERROR(CheckRun(run, trace));
  Progress progress("attend", places.size());
  Table table({"layer", arguments.scores() ? "logit rmse" : "attention error", "top-k recall",
               "received", "ms"});
  Json layers = Json::array();
  LayerResult total;
  AnswerFile file(arguments);
  for (const size_t place : places) {
    KVSHRINK_ASSIGN_OR_RETURN(const Answered answered,
                              AttendLayer(arguments, remote.get(), trace, place, run));
    const LayerResult& result = answered.result;
    Json object = {
        {"layer", result.layer}, {"queries", result.queries}, {"q_heads", result.q_heads}};
    object.update(ToJson(arguments, result));
    layers.push_back(std::move(object));
    table.Add(ToRow(arguments, StrCat(result.layer), result));
    total.Add(result);
    if (!arguments.out.empty()) {
      file.Add(trace.layers()[place], answered.answer);
    }
    progress.Update(layers.size());
  }
  if (!arguments.out.empty()) {
    KVSHRINK_RETURN_IF_ERROR(file.Write());
  }
  table.Add(ToRow(arguments, "all", total));
  Outcome outcome;
  outcome.object = {{"trace", arguments.trace},
                    {"namespace", arguments.run.name_space},
                    {"prefix", arguments.run.prefix},
                    {"mode", arguments.mode},
                    {"top_k", arguments.scores() ? arguments.top_k : 0},
                    {"chunks", run.keys().size()},
                    {"tokens", run.tokens()}};
  outcome.object.update(ToJson(arguments, total));
  outcome.object["layers"] = std::move(layers);
  outcome.text = table.ToString();
  return outcome;
}

}  // namespace

void AddAttendCommand(Program* program) {
  const auto arguments = std::make_shared<AttendArguments>();
  CLI::App* command = program->AddCommand(
      "attend", "run a trace's queries against its stored chunks and compare with exact attention",
      [arguments] { return RunAttend(*arguments); });
  command->add_option("TRACE", arguments->trace, "safetensors file with queries")->required();
  command->add_option("--mode", arguments->mode, "output: attention outputs; scores: logits")
      ->capture_default_str()
      ->check(CLI::IsMember({"output", "scores"}));
  command
      ->add_option("--top-k", arguments->top_k, "with --mode scores: only the k largest; 0 = all")
      ->capture_default_str();
  command
      ->add_option("--layer", arguments->layers,
                   "the trace's layers, separated by commas (default: all)")
      ->delimiter(',');
  command->add_option("--out", arguments->out, "safetensors file for the answers");
  arguments->server.Add(command);
  arguments->run.Add(command, true);
  arguments->backend.AddThreads(command);
  command->parse_complete_callback([arguments] {
    if (arguments->top_k > 0 && !arguments->scores()) {
      throw CLI::ValidationError("--top-k", "needs --mode scores");
    }
  });
}

}  // namespace kvshrink::cli
