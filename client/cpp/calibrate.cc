#include "kvshrink/client/calibrate.h"

#include <unistd.h>
#include <xxhash.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "kvshrink/client/basis_file.h"
#include "kvshrink/client/file_io.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/values.h"
#include "strict_json.h"

namespace kvshrink::client {
namespace {

using Json = nlohmann::ordered_json;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr std::string_view kStateMagic = "KVSBSUM1";
constexpr std::string_view kUnknown = "unknown";

// Tokens whose queries are added: the first of those that the layer has.
uint32_t TokensUsed(const CalibrationSettings& settings, const TraceQueries& q) {
  return std::min(q.tokens, settings.first_queries.value_or(q.tokens));
}

// Rows of one kv head's queries, of `tokens` tokens.
absl::StatusOr<Matrix> HeadQueries(const TraceQueries& q, uint32_t tokens, uint32_t kv_heads,
                                   uint32_t head, uint32_t d) {
  const uint32_t group = q.q_heads / kv_heads;
  const size_t bytes = DTypeBytes(q.dtype);
  Matrix rows(Eigen::Index{tokens} * group, d);
  std::vector<float> floats(size_t{group} * d);
  for (uint32_t t = 0; t < tokens; ++t) {
    const size_t first = (size_t{t} * q.q_heads + size_t{head} * group) * d;
    ToFloats(q.dtype, q.data + first * bytes, floats.size(), floats.data());
    for (size_t i = 0; i < floats.size(); ++i) {
      if (!std::isfinite(floats[i])) {
        return BadArgument("q", floats[i], StrCat("must be finite; token ", t, ", kv head ", head));
      }
      rows.data()[size_t{t} * floats.size() + i] = static_cast<double>(floats[i]);
    }
  }
  return rows;
}

absl::Status Disagree(std::string_view field, const std::string& value, const std::string& before) {
  return BadArgument(field, value, StrCat("the traces before have ", before));
}

void AppendBytes(const void* data, size_t bytes, std::string* out) {
  out->append(static_cast<const char*>(data), bytes);
}

}  // namespace

absl::StatusOr<std::vector<Calibration::Layer>> Calibration::SumTrace(
    const Trace& trace, const std::function<void(uint64_t)>& progress, uint64_t* queries) const {
  const LayerRopes& ropes = settings_.ropes ? *settings_.ropes : trace.ropes();
  std::vector<Layer> layers;
  uint64_t done_bytes = 0;
  for (size_t place = 0; place < trace.layers().size(); ++place) {
    const TraceLayer& layer = trace.layers()[place];
    if (!layer.q) {
      continue;
    }
    const TensorShape& shape = layer.k.shape;
    const uint32_t d = shape.head_dim;
    const uint32_t tokens = TokensUsed(settings_, *layer.q);
    Layer sums;
    sums.number = settings_.renumber ? static_cast<uint32_t>(place) : layer.layer;
    sums.rope = ropes.Of(layer.layer);
    if (sums.rope) {
      sums.rope->rotary_dim = sums.rope->rotary_dim == 0 ? d : sums.rope->rotary_dim;
      KVSHRINK_RETURN_IF_ERROR(ValidateRope(*sums.rope, d));
    }
    sums.moments.resize(size_t{shape.kv_heads} * d * d);
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      const auto rows = HeadQueries(*layer.q, tokens, shape.kv_heads, head, d);
      if (!rows.ok()) {
        return InContext(StrCat("layer ", layer.layer), rows.status());
      }
      double* moment = sums.moments.data() + size_t{head} * d * d;
      Eigen::Map<Matrix>(moment, d, d) = rows->transpose() * *rows;
      if (sums.rope) {
        // The keys that the last query used sees.
        const uint32_t positions = shape.tokens - layer.q->tokens + tokens;
        AverageOverTurns(*sums.rope, d, sums.rope->position_offset, positions, moment);
      }
    }
    *queries += uint64_t{tokens} * layer.q->q_heads;
    layers.push_back(std::move(sums));
    done_bytes += uint64_t{layer.q->tokens} * layer.q->q_heads * d * DTypeBytes(layer.q->dtype);
    if (progress) {
      progress(done_bytes);
    }
  }
  if (layers.empty()) {
    return BadArgument("q", "in no layer", "calibration needs queries (layer.{i}.q)");
  }
  return layers;
}

absl::Status Calibration::CheckAgrees(const Trace& trace, const std::vector<Layer>& layers) const {
  for (const TraceLayer& layer : trace.layers()) {
    const TensorShape& shape = layer.k.shape;
    const uint32_t head_dim = layers_.empty() ? trace.layers()[0].k.shape.head_dim : head_dim_;
    const uint32_t kv_heads = layers_.empty() ? trace.layers()[0].k.shape.kv_heads : kv_heads_;
    if (shape.head_dim != head_dim) {
      return Disagree(StrCat("layer.", layer.layer, ".head_dim"), StrCat(shape.head_dim),
                      StrCat(head_dim));
    }
    if (shape.kv_heads != kv_heads) {
      return Disagree(StrCat("layer.", layer.layer, ".kv_heads"), StrCat(shape.kv_heads),
                      StrCat(kv_heads));
    }
  }
  if (layers_.empty()) {
    return absl::OkStatus();
  }
  const auto numbers = [](const std::vector<Layer>& of) {
    std::string text;
    for (const Layer& layer : of) {
      text += StrCat(text.empty() ? "" : ",", layer.number);
    }
    return text;
  };
  if (numbers(layers) != numbers(layers_)) {
    return Disagree("layers", numbers(layers), numbers(layers_));
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto text = [](const Layer& layer) {
      return layer.rope ? RopeText(*layer.rope) : std::string("none");
    };
    if (layers[i].rope != layers_[i].rope) {
      return Disagree(StrCat("layer.", layers[i].number, ".rope"), text(layers[i]),
                      text(layers_[i]));
    }
  }
  return absl::OkStatus();
}

absl::Status Calibration::AddTrace(size_t number, const std::string& path,
                                   const std::function<void(uint64_t)>& progress) {
  KVSHRINK_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const uint64_t checksum = XXH64(file.bytes().data(), file.bytes().size(), 0);
  if (number < traces_.size()) {
    if (traces_[number].path != path || traces_[number].checksum != checksum) {
      return absl::FailedPreconditionError(StrCat(
          "field 'trace[", number, "]' is ", path, ": the state to resume has ",
          traces_[number].path, traces_[number].path == path ? " with another content" : ""));
    }
    return absl::OkStatus();
  }
  const absl::StatusOr<Trace> trace = Trace::Parse(file.bytes());
  if (!trace.ok()) {
    return InContext(path, trace.status());
  }
  uint64_t queries = 0;
  absl::StatusOr<std::vector<Layer>> layers = SumTrace(*trace, progress, &queries);
  absl::Status status = layers.ok() ? CheckAgrees(*trace, *layers) : layers.status();
  if (!status.ok()) {
    return InContext(path, status);
  }
  if (layers_.empty()) {
    head_dim_ = trace->layers()[0].k.shape.head_dim;
    kv_heads_ = trace->layers()[0].k.shape.kv_heads;
    const auto model = trace->metadata().find("model");
    model_ = model == trace->metadata().end() ? std::string(kUnknown) : model->second;
    layers_ = *std::move(layers);
  } else {
    for (size_t i = 0; i < layers_.size(); ++i) {
      for (size_t j = 0; j < layers_[i].moments.size(); ++j) {
        layers_[i].moments[j] += (*layers)[i].moments[j];
      }
    }
  }
  queries_ += queries;
  traces_.push_back({path, checksum});
  return absl::OkStatus();
}

// Everything of the state but the sums. Numbers are strings, so that none is rounded.
std::string Calibration::StateText() const {
  Json layers = Json::array();
  for (const Layer& layer : layers_) {
    layers.push_back(
        {{"layer", StrCat(layer.number)}, {"rope", layer.rope ? RopeText(*layer.rope) : "none"}});
  }
  Json traces = Json::array();
  for (const Added& trace : traces_) {
    traces.push_back({{"path", trace.path}, {"checksum", StrCat(trace.checksum)}});
  }
  const Json json = {{"settings",
                      {{"rope", settings_.ropes ? settings_.ropes->Text() : "of the trace"},
                       {"first_queries", settings_.first_queries ? StrCat(*settings_.first_queries)
                                                                 : std::string("all")},
                       {"renumber", settings_.renumber ? "true" : "false"}}},
                     {"model", model_},
                     {"head_dim", head_dim_},
                     {"kv_heads", kv_heads_},
                     {"queries", queries_},
                     {"layers", std::move(layers)},
                     {"traces", std::move(traces)}};
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string Calibration::SaveState() const {
  const std::string text = StateText();
  const uint64_t text_bytes = text.size();
  std::string out(kStateMagic);
  AppendBytes(&text_bytes, sizeof(text_bytes), &out);
  out += text;
  for (const Layer& layer : layers_) {
    AppendBytes(layer.moments.data(), layer.moments.size() * sizeof(double), &out);
  }
  const uint64_t checksum = XXH64(out.data(), out.size(), 0);
  AppendBytes(&checksum, sizeof(checksum), &out);
  return out;
}

// The state is read by the machine that wrote it; past its checksum the text is our own.
absl::Status Calibration::LoadState(std::string_view bytes) {
  constexpr std::string_view kField = "calibration state";
  constexpr size_t kFixedBytes = kStateMagic.size() + 2 * sizeof(uint64_t);
  const auto damaged = [&](std::string_view rule) {
    return absl::DataLossError(StrCat("field '", kField, "' is damaged: ", rule));
  };
  if (bytes.size() < kFixedBytes || bytes.substr(0, kStateMagic.size()) != kStateMagic) {
    return damaged("no such file");
  }
  uint64_t checksum = 0;
  uint64_t text_bytes = 0;
  const size_t end = bytes.size() - sizeof(checksum);
  std::memcpy(&checksum, bytes.data() + end, sizeof(checksum));
  std::memcpy(&text_bytes, bytes.data() + kStateMagic.size(), sizeof(text_bytes));
  if (checksum != XXH64(bytes.data(), end, 0) || text_bytes > bytes.size() - kFixedBytes) {
    return damaged("its checksum doesn't match");
  }
  const size_t text_begin = kStateMagic.size() + sizeof(text_bytes);
  const std::string_view text = bytes.substr(text_begin, text_bytes);
  KVSHRINK_ASSIGN_OR_RETURN(const nlohmann::json json, ParseStrictJson(text, kField, 4));
  Calibration loaded(settings_);
  try {
    const nlohmann::json own = nlohmann::json::parse(StateText());
    if (json.at("settings") != own.at("settings")) {
      return absl::FailedPreconditionError(StrCat("field 'settings' is ", own.at("settings").dump(),
                                                  ": the state to resume has ",
                                                  json.at("settings").dump()));
    }
    loaded.model_ = json.at("model").get<std::string>();
    loaded.head_dim_ = json.at("head_dim").get<uint32_t>();
    loaded.kv_heads_ = json.at("kv_heads").get<uint32_t>();
    loaded.queries_ = json.at("queries").get<uint64_t>();
    for (const auto& trace : json.at("traces")) {
      loaded.traces_.push_back({trace.at("path").get<std::string>(),
                                std::stoull(trace.at("checksum").get<std::string>())});
    }
    const size_t count = size_t{loaded.kv_heads_} * loaded.head_dim_ * loaded.head_dim_;
    const size_t layers = json.at("layers").size();
    size_t at = text_begin + text_bytes;
    if (loaded.head_dim_ > kMaxHeadDim || loaded.kv_heads_ > kMaxKvHeads ||
        (end - at) / sizeof(double) != layers * count) {
      return damaged("its sums don't have the size that its shape makes");
    }
    for (const auto& entry : json.at("layers")) {
      Layer layer;
      layer.number = static_cast<uint32_t>(std::stoul(entry.at("layer").get<std::string>()));
      KVSHRINK_ASSIGN_OR_RETURN(const LayerRopes ropes,
                                LayerRopes::Parse(entry.at("rope").get<std::string>()));
      layer.rope = ropes.Of(layer.number);
      layer.moments.resize(count);
      std::memcpy(layer.moments.data(), bytes.data() + at, count * sizeof(double));
      at += count * sizeof(double);
      loaded.layers_.push_back(std::move(layer));
    }
  } catch (const std::exception& error) {  // how the JSON library reports what isn't there
    return damaged(error.what());
  }
  *this = std::move(loaded);
  return absl::OkStatus();
}

absl::StatusOr<std::string> Calibration::Finish() const {
  if (layers_.empty()) {
    return absl::FailedPreconditionError("field 'traces' is 0: calibration needs one");
  }
  BasisContents contents;
  contents.model = settings_.model.empty() ? model_ : settings_.model;
  contents.head_dim = head_dim_;
  contents.kv_heads = kv_heads_;
  contents.queries = queries_;
  const nlohmann::json metadata = {
      {"eps", StrCat(settings_.eps)},
      {"traces", StrCat(traces_.size())},
      {"queries_per_layer",
       settings_.first_queries ? StrCat("first:", *settings_.first_queries) : "all"}};
  contents.metadata = metadata.dump();
  const size_t d = head_dim_;
  for (const Layer& layer : layers_) {
    BasisLayer out;
    out.layer = layer.number;
    out.rope = layer.rope;
    out.gains.resize(kv_heads_ * d);
    out.vectors.resize(kv_heads_ * d * d);
    for (size_t head = 0; head < kv_heads_; ++head) {
      MetricOfMoment(layer.moments.data() + head * d * d, head_dim_, settings_.eps,
                     out.gains.data() + head * d, out.vectors.data() + head * d * d);
    }
    contents.layers.push_back(std::move(out));
  }
  return WriteBasis(contents);
}

absl::StatusOr<Calibrated> CalibrateToFile(const CalibrationSettings& settings,
                                           std::span<const std::string> traces,
                                           const std::string& out, bool resume,
                                           const std::function<void(uint64_t)>& progress) {
  if (!(settings.eps >= kMinCalibrationEps && settings.eps <= kMaxCalibrationEps)) {
    return BadArgument("eps", settings.eps,
                       StrCat("must be ", kMinCalibrationEps, "..", kMaxCalibrationEps));
  }
  const std::string partial = out + ".partial";
  const auto save = [](const std::string& path, std::string_view bytes) -> absl::Status {
    KVSHRINK_ASSIGN_OR_RETURN(AtomicFile file, AtomicFile::Create(path));
    KVSHRINK_RETURN_IF_ERROR(file.WriteAt(0, bytes));
    return file.Commit();
  };
  Calibration calibration(settings);
  Calibrated result;
  if (resume) {
    const absl::StatusOr<MappedFile> state = MappedFile::Open(partial);
    if (state.ok()) {
      if (absl::Status status = calibration.LoadState(state->bytes()); !status.ok()) {
        return InContext(partial, status);
      }
      result.resumed_traces = calibration.traces();
    } else if (!absl::IsNotFound(state.status())) {
      return state.status();
    }
  }
  if (result.resumed_traces > traces.size()) {
    return absl::FailedPreconditionError(StrCat(
        "field 'traces' is ", traces.size(), ": the state to resume has ", result.resumed_traces));
  }
  for (size_t i = 0; i < traces.size(); ++i) {
    KVSHRINK_RETURN_IF_ERROR(calibration.AddTrace(i, traces[i], progress));
    if (i >= result.resumed_traces) {
      KVSHRINK_RETURN_IF_ERROR(save(partial, calibration.SaveState()));
    }
  }
  KVSHRINK_ASSIGN_OR_RETURN(const std::string bytes, calibration.Finish());
  KVSHRINK_ASSIGN_OR_RETURN(Basis basis, Basis::Parse(bytes));
  KVSHRINK_RETURN_IF_ERROR(save(out, bytes));
  if (unlink(partial.c_str()) != 0) {
    return absl::ErrnoToStatus(errno, StrCat("can't remove ", partial));
  }
  result.basis = std::make_shared<const Basis>(std::move(basis));
  result.file_bytes = bytes.size();
  return result;
}

}  // namespace kvshrink::client
