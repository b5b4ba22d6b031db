// encode, decode: traces to .kvs files and back.
#include <memory>
#include <optional>

#include "kvshrink/client/status.h"
#include "kvshrink/client/trace_codec.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

constexpr const char* kBasisHelp = "calibrated basis (.kvb) of profile kvs2c";

struct EncodeArguments {
  std::string trace;
  std::string out;
  CodingArguments coding;
  BasisArguments basis;
  BackendArguments backend;
};

absl::StatusOr<Outcome> RunEncode(const EncodeArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const client::Trace trace, client::Trace::Open(arguments.trace));
  KVSHRINK_RETURN_IF_ERROR(arguments.coding.rope.Check(trace));
  const auto backend = arguments.backend.Make();
  client::CodingSettings settings = arguments.coding.settings;
  KVSHRINK_ASSIGN_OR_RETURN(settings.basis, arguments.basis.Open());
  Progress progress("encode", trace.raw_bytes());
  KVSHRINK_ASSIGN_OR_RETURN(
      const client::EncodedFile file,
      client::EncodeFile(*backend, trace, settings, arguments.out,
                         [&](uint64_t raw_bytes) { progress.Update(raw_bytes); }));
  const ShardReport& report = file.report;
  const double mb_per_s = MbPerSecond(2 * report.entries(), file.seconds);
  Outcome outcome;
  outcome.object = {{"trace", arguments.trace},
                    {"out", arguments.out},
                    {"profile", GetProfileInfo(settings.profile).name},
                    {"tokens", trace.tokens()},
                    {"layers", trace.layers().size()},
                    {"shards", file.shards},
                    {"raw_tokens", client::RawTokens(settings, trace)},
                    {"rope", client::RopesOf(settings, trace).Text()},
                    {"raw_layers", settings.raw_layers},
                    {"raw_bytes", report.raw_bytes},
                    {"shard_bytes", report.encoded_bytes},
                    {"file_bytes", file.file_bytes},
                    {"bits_per_entry", report.bits_per_entry()},
                    {"rel_mse_k", report.k.relative_error()},
                    {"rel_mse_v", OrNull(report.v.entries > 0, report.v.relative_error())},
                    {"raw_blocks", report.k.raw_blocks + report.v.raw_blocks},
                    {"escalated_blocks", report.k.escalated_blocks + report.v.escalated_blocks},
                    {"encode_mb_per_s", mb_per_s}};
  outcome.text = Facts({{"profile", std::string(GetProfileInfo(settings.profile).name)},
                        {"rope", client::RopesOf(settings, trace).Text()},
                        {"raw", Bytes(report.raw_bytes)},
                        {"shards", StrCat(file.shards, ", ", Bytes(report.encoded_bytes))},
                        {"file", StrCat(arguments.out, ", ", Bytes(file.file_bytes))},
                        {"bits per entry", Fixed(report.bits_per_entry(), 3)},
                        {"K error", Short(report.k.relative_error())},
                        {"V error", OrDash(report.v.entries > 0, report.v.relative_error())},
                        {"blocks kept raw", StrCat(report.k.raw_blocks + report.v.raw_blocks)},
                        {"speed", StrCat(Fixed(mb_per_s, 1), " MB/s")}});
  return outcome;
}

struct DecodeArguments {
  std::string in;
  std::string out;
  std::optional<DType> dtype;
  BasisArguments basis;
  BackendArguments backend;
};

absl::StatusOr<Outcome> RunDecode(const DecodeArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const client::KvsFile file, client::KvsFile::Open(arguments.in));
  KVSHRINK_ASSIGN_OR_RETURN(const auto basis, arguments.basis.Open());
  const auto backend = arguments.backend.Make();
  Progress progress("decode", 0);
  KVSHRINK_ASSIGN_OR_RETURN(
      const client::DecodedFile decoded,
      client::DecodeFile(
          *backend, file, arguments.dtype, arguments.out,
          [&](uint64_t raw_bytes) { progress.Update(raw_bytes); }, basis.get()));
  const double mb_per_s = MbPerSecond(2 * decoded.entries, decoded.seconds);
  Outcome outcome;
  outcome.object = {{"in", arguments.in},
                    {"out", arguments.out},
                    {"form", file.previews() ? "low-rank" : "full"},
                    {"tokens", decoded.tokens},
                    {"layers", file.layers().size()},
                    {"shards", file.entries().size()},
                    {"file_bytes", file.bytes()},
                    {"raw_bytes", decoded.raw_bytes},
                    {"decode_mb_per_s", mb_per_s}};
  outcome.text =
      Facts({{"form", file.previews() ? "low-rank part only" : "full"},
             {"tokens", StrCat(decoded.tokens)},
             {"layers", StrCat(file.layers().size())},
             {"file", StrCat(arguments.out, ", ", Bytes(decoded.raw_bytes), " of tensors")},
             {"speed", StrCat(Fixed(mb_per_s, 1), " MB/s")}});
  return outcome;
}

}  // namespace

void AddEncodeCommands(Program* program) {
  const auto encode = std::make_shared<EncodeArguments>();
  CLI::App* command = program->AddCommand("encode", "code a trace into a .kvs file",
                                          [encode] { return RunEncode(*encode); });
  command->add_option("TRACE", encode->trace, "safetensors file")->required();
  command->add_option("OUT", encode->out, ".kvs file to write")->required();
  encode->coding.AddProfile(command);
  encode->coding.Add(command);
  encode->basis.Add(command, kBasisHelp);
  encode->backend.AddThreads(command);
  encode->backend.AddBackend(command);

  const auto decode = std::make_shared<DecodeArguments>();
  command = program->AddCommand("decode", "decode a .kvs file or a shard into a trace",
                                [decode] { return RunDecode(*decode); });
  command->add_option("IN", decode->in, ".kvs file or bare shard")->required();
  command->add_option("OUT", decode->out, "safetensors file to write")->required();
  decode->basis.Add(command, kBasisHelp);
  AddDtype(command, &decode->dtype, "of the tensors (default: the original's)");
  decode->backend.AddThreads(command);
  decode->backend.AddBackend(command);
}

}  // namespace kvshrink::cli
