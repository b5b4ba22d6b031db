// The kvshrink command as a user runs it, on a recorded trace.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "temp_dir.h"

namespace kvshrink::client {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

const std::string kTrace = KVSHRINK_SOURCE_DIR "/tests/data/smollm2-512.safetensors";

struct Ran {
  int exit_code = -1;
  std::string out;
  std::string error;
};

class CliTest : public ::testing::Test {
 protected:
  Ran Run(const std::string& arguments) const {
    const std::string command = std::string("'") + KVSHRINK_CLI + "' " + arguments + " >'" +
                                dir_.File("stdout") + "' 2>'" + dir_.File("stderr") + "'";
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, ReadFile(dir_.File("stdout")),
            ReadFile(dir_.File("stderr"))};
  }

  // Runs with --json; the object must be all of stdout.
  Json RunJson(const std::string& arguments, int exit_code = 0) const {
    const Ran ran = Run(arguments + " --json");
    EXPECT_EQ(ran.exit_code, exit_code) << ran.error;
    const Json json = Json::parse(ran.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << ran.out;
    return json;
  }

  std::string Quoted(const std::string& name) const { return "'" + dir_.File(name) + "'"; }

  TempDir dir_;
};

std::string Header(const std::string& safetensors) {
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) {
    length = length << 8 | static_cast<unsigned char>(safetensors[static_cast<size_t>(i)]);
  }
  return safetensors.substr(8, length);
}

TEST_F(CliTest, EncodesInspectsVerifiesAndDecodes) {
  const Json encoded = RunJson("encode '" + kTrace + "' " + Quoted("a.kvs") + " --profile kvs3");
  EXPECT_EQ(encoded["profile"], "kvs3");
  EXPECT_EQ(encoded["shards"], 12);
  EXPECT_EQ(encoded["raw_tokens"], 1);
  const std::string file = ReadFile(dir_.File("a.kvs"));
  EXPECT_EQ(encoded["file_bytes"], file.size());
  const double bits = encoded["bits_per_entry"].get<double>();
  EXPECT_GT(bits, 2.5);
  EXPECT_LT(bits, 3.6);
  EXPECT_NEAR(bits, 8.0 * encoded["shard_bytes"].get<double>() / (2.0 * 512 * 3 * 64 * 6), 1e-9);

  const Json inspected = RunJson("inspect " + Quoted("a.kvs"));
  EXPECT_EQ(inspected["form"], "kvs");
  EXPECT_EQ(inspected["chunks"], 2);
  EXPECT_EQ(inspected["layers"], Json({0, 6, 12, 17, 23, 29}));
  EXPECT_EQ(inspected["metadata"]["raw_tokens"], "1");
  EXPECT_THAT(inspected["metadata"]["model"].get<std::string>(), HasSubstr("SmolLM2"));
  ASSERT_EQ(inspected["shards"].size(), 12U);
  uint64_t shard_bytes = 0;
  for (const Json& shard : inspected["shards"]) {
    EXPECT_EQ(shard["profile"], "kvs3");
    EXPECT_EQ(shard["blocks"].size(), 2U * 3 * 2);
    uint64_t bytes = shard["sections"]["header_and_index"].get<uint64_t>();
    for (const Json& block : shard["blocks"]) {
      bytes += block["bytes"].get<uint64_t>();
      EXPECT_LE(block["rank"].get<int>(), 12);
    }
    EXPECT_EQ(bytes, shard["bytes"].get<uint64_t>())
        << "blocks, header and index are all of a shard";
    shard_bytes += bytes;
  }
  EXPECT_EQ(shard_bytes, encoded["shard_bytes"].get<uint64_t>());

  const Json verified = RunJson("verify " + Quoted("a.kvs"));
  EXPECT_EQ(verified["ok"], true);
  EXPECT_EQ(verified["shards"], 12);
  EXPECT_EQ(verified["blocks"], 144);

  const Json decoded = RunJson("decode " + Quoted("a.kvs") + " " + Quoted("b.safetensors"));
  EXPECT_EQ(decoded["tokens"], 512);
  const Json header = Json::parse(Header(ReadFile(dir_.File("b.safetensors"))));
  const Json original = Json::parse(Header(ReadFile(kTrace)));
  EXPECT_EQ(header["layer.29.v"]["dtype"], "F16");
  EXPECT_EQ(header["layer.29.v"]["shape"], original["layer.29.v"]["shape"]);
  EXPECT_EQ(header["__metadata__"]["model"], original["__metadata__"]["model"]);
  EXPECT_FALSE(header.contains("layer.29.q"));
}

TEST_F(CliTest, BoundaryLayersAreRawByChoice) {
  const Json encoded =
      RunJson("encode '" + kTrace + "' " + Quoted("a.kvs") + " --profile kvs2 --raw-layers 2");
  EXPECT_EQ(encoded["raw_layers"], 2);
  for (const Json& shard : RunJson("inspect " + Quoted("a.kvs"))["shards"]) {
    const int layer = shard["layer"].get<int>();
    const bool middle = layer == 12 || layer == 17;
    EXPECT_EQ(shard["profile"], middle ? "kvs2" : "raw") << layer;
  }
  const Json plain = RunJson("eval '" + kTrace + "' --profile kvs2")["profiles"][0];
  const Json kept = RunJson("eval '" + kTrace + "' --profile kvs2 --raw-layers 2")["profiles"][0];
  EXPECT_EQ(plain["options"]["raw_layers"], 0);
  EXPECT_EQ(kept["options"]["raw_layers"], 2);
  EXPECT_NEAR(kept["bits_per_entry"].get<double>(), encoded["bits_per_entry"].get<double>(), 1e-9);
  EXPECT_GT(kept["bits_per_entry"].get<double>(), 10);
  EXPECT_LT(kept["attention_rel_error"].get<double>(),
            plain["attention_rel_error"].get<double>() / 2);
  // As many as there are, or more: all; a rate target is for the others alone.
  const Json all = RunJson("eval '" + kTrace + "' --profile kvs2 --raw-layers 9")["profiles"][0];
  EXPECT_EQ(all["rel_mse_k"], 0);
  EXPECT_EQ(all["rel_mse_v"], 0);
  const Json rate = RunJson("encode '" + kTrace + "' " + Quoted("b.kvs") +
                            " --profile kvs2 --raw-layers 1 --bits 2.5");
  EXPECT_NEAR(rate["bits_per_entry"].get<double>(), (2 * 16.1 + 4 * 2.5) / 6, 0.1);
  EXPECT_EQ(Run("encode '" + kTrace + "' " + Quoted("c.kvs") + " --raw-layers -1").exit_code, 2);
}

TEST_F(CliTest, ABoundOnTheErrorTakesMoreBitsThenKeepsBlocksRaw) {
  const std::string encode = "encode '" + kTrace + "' " + Quoted("a.kvs") + " --profile kvs2";
  const Json plain = RunJson(encode);
  EXPECT_EQ(plain["raw_blocks"], 0);
  EXPECT_EQ(plain["escalated_blocks"], 0);
  const Json more = RunJson(encode + " --max-relative-error 0.05");
  EXPECT_GT(more["escalated_blocks"].get<int>(), 0);
  EXPECT_EQ(more["raw_blocks"], 0);
  EXPECT_GT(more["bits_per_entry"].get<double>(), plain["bits_per_entry"].get<double>());
  const Json exact = RunJson(encode + " --max-relative-error 1e-9");
  EXPECT_EQ(exact["raw_blocks"], 144);
  EXPECT_EQ(exact["escalated_blocks"], 0);
  EXPECT_EQ(exact["rel_mse_v"], 0);
  const Json eval =
      RunJson("eval '" + kTrace + "' --profile kvs2 --max-relative-error 0.05")["profiles"][0];
  EXPECT_LE(eval["max_block_rel_error"].get<double>(), 0.05 * 1.001);
  EXPECT_EQ(eval["raw_blocks"], 0);
  EXPECT_NEAR(eval["bits_per_entry"].get<double>(), more["bits_per_entry"].get<double>(), 1e-9);
  EXPECT_EQ(Run(encode + " --max-relative-error nan").exit_code, 2);
}

// The angles of this model's keys.
const std::string kRope = "--rope theta=1e5,dim=64";

TEST_F(CliTest, RopeIsAnOptionOfEncodeAndEval) {
  const Json plain = RunJson("encode '" + kTrace + "' " + Quoted("plain.kvs"));
  EXPECT_EQ(plain["rope"], "none");
  const Json encoded = RunJson("encode '" + kTrace + "' " + Quoted("a.kvs") + " " + kRope);
  EXPECT_EQ(encoded["rope"], "theta=1e5,dim=64");
  EXPECT_LT(encoded["rel_mse_k"].get<double>(), 0.7 * plain["rel_mse_k"].get<double>());
  const Json inspected = RunJson("inspect " + Quoted("a.kvs"));
  EXPECT_EQ(inspected["shards"][11]["rope"], "theta=1e+05,dim=64,pairing=neox");
  EXPECT_TRUE(RunJson("inspect " + Quoted("plain.kvs"))["shards"][11]["rope"].is_null());
  EXPECT_THAT(Run("inspect " + Quoted("a.kvs")).out, HasSubstr("theta=1e+05,dim=64"));
  EXPECT_EQ(RunJson("verify " + Quoted("a.kvs"))["ok"], true);

  const Json eval = RunJson("eval '" + kTrace + "' --profile kvs2 " + kRope);
  const Json without = RunJson("eval '" + kTrace + "' --profile kvs2");
  const Json& found = eval["profiles"][0];
  EXPECT_EQ(found["options"]["rope"], "theta=1e5,dim=64");
  EXPECT_EQ(without["profiles"][0]["options"]["rope"], "none");
  EXPECT_LT(found["attention_rel_error"].get<double>(),
            0.9 * without["profiles"][0]["attention_rel_error"].get<double>());
}

// A trace of the recorded tensors whose metadata have these in addition.
std::string WithMetadata(const std::string& trace, const Json& added) {
  Json header = Json::parse(Header(trace));
  header["__metadata__"].update(added);
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string out;
  for (size_t i = 0; i < 8; ++i) {
    out += static_cast<char>(text.size() >> (8 * i));
  }
  return out + text + trace.substr(8 + Header(trace).size());
}

TEST_F(CliTest, RopeOfTheTraceIsHonoured) {
  const std::string trace = ReadFile(kTrace);
  WriteFile(dir_.File("t"),
            WithMetadata(trace, {{"rope_theta", "1e5"}, {"rope_theta@6/12", "none"}}));
  const std::string text = "theta=1e5,theta@6/12=none";
  EXPECT_EQ(RunJson("encode " + Quoted("t") + " " + Quoted("a.kvs"))["rope"], text);
  EXPECT_EQ(RunJson("encode " + Quoted("t") + " " + Quoted("b.kvs") + " --rope trace")["rope"],
            text);
  EXPECT_EQ(ReadFile(dir_.File("a.kvs")), ReadFile(dir_.File("b.kvs")));
  const Json inspected = RunJson("inspect " + Quoted("a.kvs"));
  EXPECT_EQ(inspected["shards"][0]["rope"], "theta=1e+05,dim=64,pairing=neox");
  EXPECT_TRUE(inspected["shards"][1]["rope"].is_null());
  EXPECT_EQ(RunJson("encode " + Quoted("t") + " " + Quoted("c.kvs") + " --rope none")["rope"],
            "none");
  const Json missing = RunJson("encode '" + kTrace + "' " + Quoted("d.kvs") + " --rope trace", 1);
  EXPECT_THAT(missing["error"]["message"].get<std::string>(), HasSubstr("'rope' is trace"));
  const Json bad = RunJson("encode '" + kTrace + "' " + Quoted("e.kvs") + " --rope theta=0.5", 1);
  EXPECT_EQ(bad["error"]["code"], "INVALID_ARGUMENT");
  EXPECT_THAT(bad["error"]["message"].get<std::string>(), HasSubstr("'rope.theta' is 0.5"));
}

TEST_F(CliTest, RawGivesBackEveryBit) {
  RunJson("encode '" + kTrace + "' " + Quoted("raw.kvs") + " --profile raw --chunk-tokens 200");
  RunJson("decode " + Quoted("raw.kvs") + " " + Quoted("raw.safetensors"));
  const std::string before = ReadFile(kTrace);
  const std::string after = ReadFile(dir_.File("raw.safetensors"));
  const Json header_before = Json::parse(Header(before));
  const Json header_after = Json::parse(Header(after));
  const auto bytes = [](const std::string& file, const Json& header, const std::string& name) {
    const Json& offsets = header[name]["data_offsets"];
    const size_t data = 8 + Header(file).size();
    return file.substr(data + offsets[0].get<size_t>(),
                       offsets[1].get<size_t>() - offsets[0].get<size_t>());
  };
  for (const char* name : {"layer.0.k", "layer.0.v", "layer.17.k", "layer.29.v"}) {
    EXPECT_EQ(bytes(before, header_before, name), bytes(after, header_after, name)) << name;
  }
}

TEST_F(CliTest, DecodesIntoTheDtypeAskedFor) {
  RunJson("encode '" + kTrace + "' " + Quoted("a.kvs"));
  RunJson("decode " + Quoted("a.kvs") + " " + Quoted("f.safetensors") + " --dtype bf16");
  EXPECT_EQ(Json::parse(Header(ReadFile(dir_.File("f.safetensors"))))["layer.0.k"]["dtype"],
            "BF16");
}

TEST_F(CliTest, EvalReportsEveryProfileAsked) {
  const Json eval = RunJson("eval '" + kTrace + "' --profile raw,kvs2,tq2,kvs4");
  EXPECT_EQ(eval["trace"], kTrace);
  EXPECT_EQ(eval["head_dim"], 64);
  EXPECT_EQ(eval["tokens"], 512);
  EXPECT_EQ(eval["layers"], 6);
  EXPECT_EQ(eval["backend"], "cpu");
  ASSERT_EQ(eval["profiles"].size(), 4U);
  const Json& raw = eval["profiles"][0];
  EXPECT_EQ(raw["profile"], "raw");
  EXPECT_EQ(raw["rel_mse_k"], 0);
  EXPECT_EQ(raw["logit_rmse"], 0);
  EXPECT_EQ(raw["attention_kl"], 0);
  EXPECT_GT(raw["bits_per_entry"].get<double>(), 16) << "headers count";
  EXPECT_EQ(raw["raw_blocks"], 144);
  const Json& kvs2 = eval["profiles"][1];
  const Json& tq2 = eval["profiles"][2];
  const Json& kvs4 = eval["profiles"][3];
  for (const char* field :
       {"options", "bits_per_entry", "bits_per_entry_k", "bits_per_entry_v", "rel_mse_k",
        "rel_mse_v", "logit_rmse", "attention_rel_error", "attention_kl", "max_block_rel_error",
        "raw_blocks", "mean_rank_k", "mean_rank_v", "encode_mb_per_s", "decode_mb_per_s"}) {
    EXPECT_TRUE(kvs2.contains(field)) << field;
  }
  EXPECT_NEAR(kvs2["bits_per_entry"].get<double>(),
              (kvs2["bits_per_entry_k"].get<double>() + kvs2["bits_per_entry_v"].get<double>()) / 2,
              1e-9);
  EXPECT_LT(kvs2["attention_kl"].get<double>(), tq2["attention_kl"].get<double>());
  EXPECT_LT(kvs4["attention_rel_error"].get<double>(), kvs2["attention_rel_error"].get<double>());
  EXPECT_GT(kvs2["encode_mb_per_s"].get<double>(), 0);
}

TEST_F(CliTest, EvalHonoursTheErrorBound) {
  const Json eval = RunJson("eval '" + kTrace + "' --profile kvs2 --max-relative-error 0.05");
  const Json& found = eval["profiles"][0];
  EXPECT_LE(found["max_block_rel_error"].get<double>(), 0.05);
  EXPECT_EQ(found["options"]["max_relative_error"], 0.05);
}

TEST_F(CliTest, TheFileDoesNotDependOnThreads) {
  RunJson("encode '" + kTrace + "' " + Quoted("1.kvs") + " --threads 1");
  RunJson("encode '" + kTrace + "' " + Quoted("4.kvs") + " --threads 4");
  EXPECT_EQ(ReadFile(dir_.File("1.kvs")), ReadFile(dir_.File("4.kvs")));
}

TEST_F(CliTest, VerifyFindsAFlippedBitAnywhere) {
  RunJson("encode '" + kTrace + "' " + Quoted("a.kvs"));
  const std::string good = ReadFile(dir_.File("a.kvs"));
  for (const size_t place :
       {size_t{5}, size_t{60}, size_t{450}, good.size() / 2, good.size() - 1}) {
    SCOPED_TRACE(place);
    std::string bad = good;
    bad[place] = static_cast<char>(bad[place] ^ 0x10);
    WriteFile(dir_.File("bad.kvs"), bad);
    const Json verified = RunJson("verify " + Quoted("bad.kvs"), 1);
    EXPECT_EQ(verified["ok"], false);
    EXPECT_THAT(verified["error"].get<std::string>(), HasSubstr("field '"));
    EXPECT_EQ(Run("verify " + Quoted("bad.kvs")).exit_code, 1);
    EXPECT_EQ(Run("decode " + Quoted("bad.kvs") + " " + Quoted("bad.safetensors")).exit_code, 1);
    EXPECT_FALSE(std::filesystem::exists(dir_.File("bad.safetensors"))) << "nothing half-written";
  }
}

TEST_F(CliTest, ReadsABareShard) {
  RunJson("encode '" + kTrace + "' " + Quoted("a.kvs"));
  const Json inspected = RunJson("inspect " + Quoted("a.kvs"));
  const Json& shard = inspected["shards"][7];
  const std::string file = ReadFile(dir_.File("a.kvs"));
  WriteFile(dir_.File("s.kvs"),
            file.substr(shard["offset"].get<size_t>(), shard["bytes"].get<size_t>()));
  const Json bare = RunJson("inspect " + Quoted("s.kvs"));
  EXPECT_EQ(bare["form"], "shard");
  EXPECT_EQ(bare["shards"][0]["blocks"], shard["blocks"]);
  EXPECT_EQ(RunJson("verify " + Quoted("s.kvs"))["ok"], true);
  EXPECT_EQ(RunJson("decode " + Quoted("s.kvs") + " " + Quoted("s.safetensors"))["tokens"], 256);
}

TEST_F(CliTest, TextIsForPeople) {
  const Ran eval = Run("eval '" + kTrace + "' --profile tq2,fp8");
  EXPECT_EQ(eval.exit_code, 0);
  EXPECT_THAT(eval.out, HasSubstr("attention KL"));
  EXPECT_THAT(eval.out, HasSubstr("\nfp8 "));
  EXPECT_EQ(eval.error, "") << "no progress bar where there is no terminal";
  EXPECT_EQ(Run("encode '" + kTrace + "' " + Quoted("a.kvs")).exit_code, 0);
  EXPECT_THAT(Run("inspect --blocks " + Quoted("a.kvs")).out, HasSubstr("3 levels"));
  EXPECT_THAT(Run("verify " + Quoted("a.kvs")).out, HasSubstr("sound"));
  EXPECT_EQ(Run("--help").exit_code, 0);
  EXPECT_EQ(Run("eval --help").exit_code, 0);
}

TEST_F(CliTest, UsageErrorsExitWith2) {
  for (const std::string& arguments :
       std::vector<std::string>{"",
                                "frobnicate",
                                "encode",
                                "encode a",
                                "encode a b c",
                                "encode a b --profile best",
                                "encode a b --chunk-tokens 0",
                                "encode a b --chunk-tokens 65537",
                                "encode a b --raw-tokens -1",
                                "encode a b --max-relative-error -1",
                                "encode a b --threads -1",
                                "encode a b --rope theta",
                                "encode a b --rope dim=64",
                                "eval t --rope theta=1e4,pairing=half",
                                "eval t --profile kvs2,best",
                                "eval t --backend gpu",
                                "decode a b --dtype fp7",
                                "put t --namespace n",
                                "put t --prefix p",
                                "put t --namespace '' --prefix p",
                                "get --namespace n --prefix p --out x.txt",
                                "get --namespace n --prefix p --out x.kvs --form decoded",
                                "get --namespace n --prefix p --form x",
                                "attend t --namespace n --prefix p --top-k 3",
                                "stat --namespace n",
                                "delete --namespace n --prefix p --key k",
                                "info --server nowhere"}) {
    SCOPED_TRACE(arguments);
    const Ran ran = Run(arguments);
    EXPECT_EQ(ran.exit_code, 2);
    EXPECT_NE(ran.error, "");
    EXPECT_EQ(ran.out, "");
  }
}

TEST_F(CliTest, FailuresExitWith1AndSayWhat) {
  const Json missing = RunJson("encode nowhere.safetensors " + Quoted("a.kvs"), 1);
  EXPECT_EQ(missing["error"]["code"], "NOT_FOUND");
  EXPECT_THAT(missing["error"]["message"].get<std::string>(), HasSubstr("nowhere.safetensors"));
  WriteFile(dir_.File("garbage"), std::string(100, 'g'));
  EXPECT_EQ(RunJson("encode " + Quoted("garbage") + " " + Quoted("a.kvs"), 1)["error"]["code"],
            "DATA_LOSS");
  EXPECT_EQ(RunJson("inspect " + Quoted("garbage"), 1)["error"]["code"], "DATA_LOSS");
  EXPECT_EQ(RunJson("decode " + Quoted("garbage") + " " + Quoted("b"), 1)["error"]["code"],
            "DATA_LOSS");
  for (const char* command :
       {"info", "ls", "lookup --namespace n --prefix p", "get --namespace n --prefix p",
        "stat --namespace n --key k", "delete --namespace n --prefix p"}) {
    SCOPED_TRACE(command);
    EXPECT_EQ(RunJson(std::string(command) + " --server 127.0.0.1:1", 1)["error"]["code"],
              "UNAVAILABLE");
  }
}

TEST_F(CliTest, TheEnvironmentNamesTheServer) {
  ASSERT_EQ(setenv("KVSHRINK_SERVER", "127.0.0.1:2", 1), 0);
  const Ran ran = Run("info");
  ASSERT_EQ(unsetenv("KVSHRINK_SERVER"), 0);
  EXPECT_EQ(ran.exit_code, 1);
  EXPECT_THAT(ran.error, HasSubstr("127.0.0.1:2"));
}

}  // namespace
}  // namespace kvshrink::client
