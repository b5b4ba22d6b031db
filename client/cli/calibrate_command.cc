// calibrate: the metric in which a model's queries look at keys, from traces with queries.
#include <algorithm>
#include <memory>
#include <optional>

#include "absl/strings/numbers.h"
#include "kvshrink/client/calibrate.h"
#include "kvshrink/client/status.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

constexpr std::string_view kAll = "all";
constexpr std::string_view kFirst = "first:";

struct CalibrateArguments {
  std::vector<std::string> traces;
  std::string out;
  std::string queries = std::string(kAll);
  bool resume = false;
  RopeArguments rope;
  client::CalibrationSettings settings;
};

// first:N as N; none for "all".
absl::StatusOr<std::optional<uint32_t>> FirstQueries(const std::string& text) {
  uint32_t count = 0;
  if (text == kAll) {
    return std::optional<uint32_t>();
  }
  if (text.rfind(kFirst, 0) != 0 || !absl::SimpleAtoi(text.substr(kFirst.size()), &count) ||
      count == 0) {
    return BadArgument("queries", text, "must be all, or first:N with N above 0");
  }
  return std::optional<uint32_t>(count);
}

std::string CheckQueries(const std::string& text) {
  const auto first = FirstQueries(text);
  return first.ok() ? "" : std::string(first.status().message());
}

// Bytes of the queries of all traces, for the bar; and that each has what the arguments need.
absl::StatusOr<uint64_t> QueryBytes(const CalibrateArguments& arguments) {
  uint64_t bytes = 0;
  for (const std::string& path : arguments.traces) {
    const auto trace = client::Trace::Open(path);
    const absl::Status status = trace.ok() ? arguments.rope.Check(*trace) : trace.status();
    if (!status.ok()) {
      return client::InContext(path, status);
    }
    for (const client::TraceLayer& layer : trace->layers()) {
      bytes += layer.q ? uint64_t{layer.q->tokens} * layer.q->q_heads * layer.k.shape.head_dim *
                             DTypeBytes(layer.q->dtype)
                       : 0;
    }
  }
  return bytes;
}

absl::StatusOr<Outcome> RunCalibrate(const CalibrateArguments& arguments) {
  client::CalibrationSettings settings = arguments.settings;
  KVSHRINK_ASSIGN_OR_RETURN(settings.first_queries, FirstQueries(arguments.queries));
  KVSHRINK_ASSIGN_OR_RETURN(const uint64_t total_bytes, QueryBytes(arguments));
  Progress progress("calibrate", total_bytes);
  uint64_t before = 0;
  uint64_t last = 0;
  KVSHRINK_ASSIGN_OR_RETURN(
      const client::Calibrated done,
      client::CalibrateToFile(settings, arguments.traces, arguments.out, arguments.resume,
                              [&](uint64_t bytes) {
                                before += bytes < last ? last : 0;  // the next trace begins
                                last = bytes;
                                progress.Update(before + bytes);
                              }));
  const Basis& basis = *done.basis;
  float least = kMaxBasisGain;
  float most = 0;
  Json layers = Json::array();
  for (const Basis::Layer& layer : basis.layers()) {
    layers.push_back({{"layer", layer.layer},
                      {"rope", layer.rope ? Json(RopeText(*layer.rope)) : Json()},
                      {"smallest_gain", layer.smallest_gain},
                      {"largest_gain", layer.largest_gain}});
    least = std::min(least, layer.smallest_gain);
    most = std::max(most, layer.largest_gain);
  }
  Outcome outcome;
  outcome.object = {{"out", arguments.out},
                    {"id", BasisIdText(basis.id())},
                    {"model", basis.model()},
                    {"head_dim", basis.head_dim()},
                    {"kv_heads", basis.kv_heads()},
                    {"queries", basis.queries()},
                    {"traces", arguments.traces.size()},
                    {"resumed_traces", done.resumed_traces},
                    {"eps", settings.eps},
                    {"file_bytes", done.file_bytes},
                    {"layers", std::move(layers)}};
  outcome.text = Facts(
      {{"basis", StrCat(arguments.out, ", ", Bytes(done.file_bytes))},
       {"id", BasisIdText(basis.id())},
       {"model", Printable(basis.model())},
       {"layers", StrCat(basis.layers().size(), " of ", basis.kv_heads(), "x", basis.head_dim())},
       {"queries", StrCat(basis.queries())},
       {"gains",
        StrCat(Short(static_cast<double>(least)), " to ", Short(static_cast<double>(most)))}});
  return outcome;
}

}  // namespace

void AddCalibrateCommand(Program* program) {
  const auto arguments = std::make_shared<CalibrateArguments>();
  CLI::App* command =
      program->AddCommand("calibrate", "make a basis for profile kvs2c from traces with queries",
                          [arguments] { return RunCalibrate(*arguments); });
  command->add_option("TRACE", arguments->traces, "safetensors files with queries")->required();
  command->add_option("--out", arguments->out, ".kvb file to write")->required();
  arguments->rope.Add(command, &arguments->settings.ropes);
  command
      ->add_option("--eps", arguments->settings.eps,
                   "how far all directions count, beside those of the queries: larger carries over "
                   "to other texts")
      ->capture_default_str()
      ->check(CLI::Range(kMinCalibrationEps, kMaxCalibrationEps));
  command
      ->add_option("--queries", arguments->queries,
                   "of each trace: all, or first:N (the first N tokens that have queries)")
      ->capture_default_str()
      ->check(CLI::Validator(CheckQueries, "QUERIES"));
  command->add_option("--model", arguments->settings.model,
                      "name kept in the basis (default: the first trace's)");
  command->add_flag("--renumber", arguments->settings.renumber,
                    "number layers 0, 1, ... by place, as `put` does with traces that have gaps");
  command->add_flag("--resume", arguments->resume,
                    "go on from OUT.partial, which a run that was killed has left");
}

}  // namespace kvshrink::cli
