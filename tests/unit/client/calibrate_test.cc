// Calibration: sums of queries, traces that disagree, runs that were killed, and what it is for.
#include "kvshrink/client/calibrate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "kvshrink/client/basis_file.h"
#include "kvshrink/client/evaluate.h"
#include "kvshrink/strcat.h"
#include "temp_dir.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;

const std::string kData = KVSHRINK_SOURCE_DIR "/tests/data/";
const std::string kSmol = kData + "smollm2-512.safetensors";
const std::string kQwen = kData + "qwen2.5-coder-512.safetensors";

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// A trace of layers 3 and 5 with queries of the last tokens: 8 tokens of 2 x 4, 2 query heads each.
struct TinyTrace {
  uint32_t kv_heads = 2;
  uint32_t head_dim = 4;
  std::vector<uint32_t> layers = {3, 5};
  Metadata metadata;
  float value = 1;
  bool queries = true;

  void Save(const std::string& path) const {
    std::vector<SafetensorsWriter::Tensor> tensors;
    for (const uint32_t layer : layers) {
      for (const char* kind : {"k", "v"}) {
        tensors.push_back({StrCat("layer.", layer, ".", kind), "F32", {8, kv_heads, head_dim}});
      }
      if (queries) {
        tensors.push_back({StrCat("layer.", layer, ".q"), "F32", {5, 2 * kv_heads, head_dim}});
      }
    }
    SafetensorsWriter writer = *SafetensorsWriter::Create(path, metadata, tensors);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto& shape = tensors[i].shape;
      std::vector<float> values(shape[0] * shape[1] * shape[2]);
      for (size_t j = 0; j < values.size(); ++j) {
        values[j] = std::sin(static_cast<float>(j * (i + 1)));
      }
      values.back() = value;
      ASSERT_TRUE(
          writer
              .Write(i, 0,
                     {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)})
              .ok());
    }
    ASSERT_TRUE(writer.Finish().ok());
  }
};

class CalibrateTest : public ::testing::Test {
 protected:
  std::string Path(const std::string& name) const { return dir_.File(name); }

  std::string Save(const std::string& name, const TinyTrace& trace) const {
    trace.Save(Path(name));
    return Path(name);
  }

  TempDir dir_;
};

TEST_F(CalibrateTest, MetricIsThatOfTheQueries) {
  const std::string path = Save("a", {});
  CalibrationSettings settings;
  settings.first_queries = 3;
  const std::vector<std::string> traces = {path};
  const auto done = CalibrateToFile(settings, traces, Path("out.kvb"), false, nullptr);
  ASSERT_TRUE(done.ok()) << done.status();
  const auto basis = OpenBasis(Path("out.kvb"));
  ASSERT_TRUE(basis.ok()) << basis.status();
  EXPECT_EQ((*basis)->id(), done->basis->id());
  EXPECT_EQ((*basis)->queries(), 2U * 3 * 4);
  EXPECT_EQ((*basis)->model(), "unknown");
  EXPECT_EQ(BasisMetadata(**basis)->at("queries_per_layer"), "first:3");
  ASSERT_EQ((*basis)->layers().size(), 2U);
  // W^2 (1 + eps) tr(S)/d = S + eps tr(S)/d I, for the second layer's second head.
  const Trace trace = *Trace::Open(path);
  std::vector<float> q;
  QueriesOf(trace.layers()[1], &q);
  double moment[4][4] = {};
  for (size_t t = 0; t < 3; ++t) {
    for (size_t head = 2; head < 4; ++head) {
      const float* row = q.data() + (t * 4 + head) * 4;
      for (size_t i = 0; i < 4; ++i) {
        for (size_t j = 0; j < 4; ++j) {
          moment[i][j] += static_cast<double>(row[i]) * static_cast<double>(row[j]);
        }
      }
    }
  }
  const double mean = (moment[0][0] + moment[1][1] + moment[2][2] + moment[3][3]) / 4;
  const float* weight = (*basis)->metric(5, 1).weight;
  for (size_t i = 0; i < 4; ++i) {
    for (size_t j = 0; j < 4; ++j) {
      double square = 0;
      for (size_t c = 0; c < 4; ++c) {
        square += static_cast<double>(weight[4 * i + c]) * static_cast<double>(weight[4 * c + j]);
      }
      EXPECT_NEAR(square, (moment[i][j] / mean + (i == j ? settings.eps : 0)) / (1 + settings.eps),
                  1e-5);
    }
  }
}

TEST_F(CalibrateTest, RenumbersAndKeepsRopes) {
  TinyTrace trace;
  trace.metadata = {{"model", "tiny"}, {"rope_theta", "10000"}, {"rope_theta@5", "none"}};
  const std::vector<std::string> traces = {Save("a", trace)};
  CalibrationSettings settings;
  settings.renumber = true;
  const auto done = CalibrateToFile(settings, traces, Path("out.kvb"), false, nullptr);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->basis->model(), "tiny");
  ASSERT_EQ(done->basis->layers().size(), 2U);
  EXPECT_EQ(done->basis->layers()[0].layer, 0U);
  EXPECT_EQ(done->basis->layers()[0].rope->rotary_dim, 4U);
  EXPECT_EQ(done->basis->layers()[1].layer, 1U);
  EXPECT_FALSE(done->basis->layers()[1].rope.has_value());
}

TEST_F(CalibrateTest, TracesThatDisagreeAreNamedWithTheField) {
  const std::string first = Save("first", {});
  const auto expect = [&](const TinyTrace& trace, const std::string& message) {
    const std::vector<std::string> traces = {first, Save("second", trace)};
    const auto status = CalibrateToFile({}, traces, Path("out.kvb"), false, nullptr).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("second: "));
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  };
  TinyTrace trace;
  trace.head_dim = 6;
  expect(trace, "'layer.3.head_dim' is 6: the traces before have 4");
  trace = {};
  trace.kv_heads = 1;
  expect(trace, "'layer.3.kv_heads' is 1: the traces before have 2");
  trace = {};
  trace.layers = {3, 6};
  expect(trace, "'layers' is 3,6: the traces before have 3,5");
  trace = {};
  trace.metadata = {{"rope_theta", "10000"}};
  expect(trace, "'layer.3.rope' is theta=10000,dim=4,pairing=neox");
  trace = {};
  trace.value = NAN;
  expect(trace, "layer 3: field 'q' is nan: must be finite; token 4, kv head 1");
  trace = {};
  trace.queries = false;
  expect(trace, "'q' is in no layer");
}

// A run that was killed after any trace and resumed ends with the bytes of one that wasn't.
TEST_F(CalibrateTest, AKilledRunResumesToTheSameBytes) {
  std::vector<std::string> traces;
  TinyTrace trace;
  trace.metadata = {{"rope_theta", "10000"}, {"model", "tiny"}};
  for (const float value : {1.0F, 7.3F, -2.0F}) {
    trace.value = value;
    traces.push_back(Save(StrCat("trace", value), trace));
  }
  ASSERT_TRUE(CalibrateToFile({}, traces, Path("whole.kvb"), false, nullptr).ok());
  EXPECT_EQ(ReadFile(Path("whole.kvb.partial")), "");
  for (size_t done = 0; done <= 3; ++done) {
    Calibration calibration{CalibrationSettings{}};
    for (size_t i = 0; i < done; ++i) {
      ASSERT_TRUE(calibration.AddTrace(i, traces[i], nullptr).ok());
    }
    if (done > 0) {
      Write(Path("resumed.kvb.partial"), calibration.SaveState());
    }
    const auto resumed = CalibrateToFile({}, traces, Path("resumed.kvb"), true, nullptr);
    ASSERT_TRUE(resumed.ok()) << resumed.status();
    EXPECT_EQ(resumed->resumed_traces, done);
    EXPECT_EQ(ReadFile(Path("resumed.kvb")), ReadFile(Path("whole.kvb")));
  }
}

TEST_F(CalibrateTest, AStateThatDoesntFitIsRefused) {
  const std::vector<std::string> traces = {Save("a", {}), Save("b", {})};
  Calibration calibration{CalibrationSettings{}};
  ASSERT_TRUE(calibration.AddTrace(0, traces[0], nullptr).ok());
  const std::string state = calibration.SaveState();
  const auto resume = [&](const std::string& bytes, const CalibrationSettings& settings,
                          const std::vector<std::string>& of) {
    Write(Path("out.kvb.partial"), bytes);
    return CalibrateToFile(settings, of, Path("out.kvb"), true, nullptr).status();
  };
  for (size_t i = 0; i < state.size(); i += 7) {
    std::string bad = state;
    bad[i] = static_cast<char>(bad[i] ^ 1);
    EXPECT_EQ(resume(bad, {}, traces).code(), absl::StatusCode::kDataLoss) << i;
    EXPECT_EQ(resume(state.substr(0, i), {}, traces).code(), absl::StatusCode::kDataLoss) << i;
  }
  const auto expect = [](const absl::Status& status, const std::string& message) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  };
  CalibrationSettings other;
  other.first_queries = 2;
  expect(resume(state, other, traces), "'settings' is {\"first_queries\":\"2\"");
  expect(resume(state, {}, {traces[1]}), "'trace[0]'");
  expect(resume(state, {}, {}), "'traces' is 0");
  TinyTrace changed;
  changed.value = 3;
  changed.Save(traces[0]);
  expect(resume(state, {}, traces), "with another content");
}

TEST_F(CalibrateTest, EpsOutOfRangeIsRefused) {
  CalibrationSettings settings;
  for (const double eps : {0.0, 1e9, std::nan("")}) {
    settings.eps = eps;
    const auto status = CalibrateToFile(settings, {}, Path("x"), false, nullptr).status();
    EXPECT_THAT(std::string(status.message()), HasSubstr("'eps' is "));
  }
}

// What a trace loses with kvs2, and with kvs2c on its first half of queries.
struct Quality {
  AttentionErrors plain, calibrated;
};

Quality Compare(const std::string& path, const std::string& rope) {
  const Trace trace = *Trace::Open(path);
  const auto backend = MakeCpuBackend(2);
  CodingSettings settings;
  settings.ropes = *LayerRopes::Parse(rope);
  Quality quality;
  quality.plain = *Evaluate(*backend, trace, settings, 2, nullptr)->attention;
  CalibrationSettings calibration_settings;
  calibration_settings.ropes = settings.ropes;
  calibration_settings.first_queries = 64;
  Calibration calibration(calibration_settings);
  EXPECT_TRUE(calibration.AddTrace(0, path, nullptr).ok());
  settings.profile = Profile::kKvs2c;
  settings.basis = std::make_shared<const Basis>(*Basis::Parse(*calibration.Finish()));
  const auto found = Evaluate(*backend, trace, settings, 2, nullptr);
  EXPECT_TRUE(found.ok()) << found.status();
  quality.calibrated = *found->attention;
  return quality;
}

TEST(CalibrationQuality, AttentionLosesLess) {
  struct Case {
    std::string path, rope;
    double error, kl;  // at most this much of kvs2's
  };
  // Where the error of V is most of the output's, that of K shows in the weights alone.
  for (const Case& test : {Case{kQwen, "none", 0.75, 0.3}, Case{kQwen, "theta=1e6", 0.8, 0.7},
                           Case{kSmol, "none", 0.85, 0.4}, Case{kSmol, "theta=1e5", 0.9, 0.4}}) {
    const Quality quality = Compare(test.path, test.rope);
    EXPECT_LT(quality.calibrated.attention_rel_error(),
              test.error * quality.plain.attention_rel_error())
        << test.path << test.rope;
    EXPECT_LT(quality.calibrated.attention_kl(), test.kl * quality.plain.attention_kl())
        << test.path << test.rope;
  }
}

}  // namespace
}  // namespace kvshrink::client
