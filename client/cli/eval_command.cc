// eval: what profiles cost and keep, on a captured trace.
#include <algorithm>
#include <memory>
#include <vector>

#include "kvshrink/client/evaluate.h"
#include "kvshrink/client/status.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

struct EvalArguments {
  std::string trace;
  std::vector<std::string> profiles = {std::string(GetProfileInfo(kDefaultProfile).name)};
  CodingArguments coding;
  BasisArguments basis;
  BackendArguments backend;
};

// Fields of values are null for a trace of keys only, those of attention also without queries.
Json ToJson(const std::string& profile, const Json& options, const client::Evaluation& found) {
  const bool values = found.v.entries > 0;
  Json object = {
      {"profile", profile},
      {"options", options},
      {"bits_per_entry", found.bits_per_entry()},
      {"bits_per_entry_k", found.k.bits_per_entry()},
      {"bits_per_entry_v", OrNull(values, found.v.bits_per_entry())},
      {"rel_mse_k", found.k.rel_mse()},
      {"rel_mse_v", OrNull(values, found.v.rel_mse())},
      {"logit_rmse", nullptr},
      {"attention_rel_error", nullptr},
      {"attention_kl", nullptr},
      {"max_block_rel_error", std::max(found.k.max_block_rel_error, found.v.max_block_rel_error)},
      {"raw_blocks", found.k.raw_blocks + found.v.raw_blocks},
      {"mean_rank_k", found.k.mean_rank},
      {"mean_rank_v", OrNull(values, found.v.mean_rank)},
      {"encode_mb_per_s", found.encode_mb_per_s()},
      {"decode_mb_per_s", found.decode_mb_per_s()}};
  if (found.attention) {
    object["logit_rmse"] = found.attention->logit_rmse();
    object["attention_rel_error"] =
        OrNull(found.attention->outputs > 0, found.attention->attention_rel_error());
    object["attention_kl"] = found.attention->attention_kl();
  }
  return object;
}

std::vector<std::string> ToRow(const std::string& profile, const client::Evaluation& found) {
  const bool values = found.v.entries > 0;
  std::vector<std::string> row = {profile,
                                  Fixed(found.bits_per_entry(), 3),
                                  Fixed(found.k.bits_per_entry(), 3),
                                  values ? Fixed(found.v.bits_per_entry(), 3) : "-",
                                  Short(found.k.rel_mse()),
                                  OrDash(values, found.v.rel_mse())};
  const auto& attention = found.attention;
  row.push_back(attention ? Short(attention->logit_rmse()) : "-");
  row.push_back(attention ? OrDash(attention->outputs > 0, attention->attention_rel_error()) : "-");
  row.push_back(attention ? Short(attention->attention_kl()) : "-");
  row.push_back(Fixed(found.k.mean_rank, 1));
  row.push_back(values ? Fixed(found.v.mean_rank, 1) : "-");
  row.push_back(StrCat(found.k.raw_blocks + found.v.raw_blocks));
  row.push_back(Fixed(found.encode_mb_per_s(), 1));
  row.push_back(Fixed(found.decode_mb_per_s(), 1));
  return row;
}

absl::StatusOr<Outcome> RunEval(const EvalArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const client::Trace trace, client::Trace::Open(arguments.trace));
  KVSHRINK_RETURN_IF_ERROR(arguments.coding.rope.Check(trace));
  const auto backend = arguments.backend.Make();
  client::CodingSettings settings = arguments.coding.settings;
  KVSHRINK_ASSIGN_OR_RETURN(settings.basis, arguments.basis.Open());
  const Json options = {
      {"chunk_tokens", settings.chunk_tokens},
      {"raw_tokens", client::RawTokens(settings, trace)},
      {"raw_layers", settings.raw_layers},
      {"max_relative_error", settings.max_relative_error},
      {"bits_per_entry", settings.bits_per_entry},
      {"fixed_size", settings.fixed_size},
      {"basis", settings.basis ? Json(BasisIdText(settings.basis->id())) : Json()},
      {"rope", client::RopesOf(settings, trace).Text()},
      {"threads", arguments.backend.threads}};
  Table table({"profile", "bits", "K bits", "V bits", "K error", "V error", "logit rmse",
               "attention error", "attention KL", "K rank", "V rank", "raw blocks", "encode MB/s",
               "decode MB/s"});
  Json profiles = Json::array();
  Progress progress("eval", trace.raw_bytes() * arguments.profiles.size());
  for (size_t i = 0; i < arguments.profiles.size(); ++i) {
    const std::string& profile = arguments.profiles[i];
    settings.profile = *ProfileFromName(profile);
    progress.SetLabel(StrCat("eval ", profile));
    const uint64_t before = trace.raw_bytes() * i;
    KVSHRINK_ASSIGN_OR_RETURN(
        const client::Evaluation found,
        client::Evaluate(*backend, trace, settings, arguments.backend.threads,
                         [&](uint64_t raw_bytes) { progress.Update(before + raw_bytes); }));
    profiles.push_back(ToJson(profile, options, found));
    table.Add(ToRow(profile, found));
  }
  Outcome outcome;
  outcome.object = {{"trace", arguments.trace},   {"head_dim", trace.layers()[0].k.shape.head_dim},
                    {"tokens", trace.tokens()},   {"layers", trace.layers().size()},
                    {"backend", backend->name()}, {"profiles", std::move(profiles)}};
  outcome.text = table.ToString();
  return outcome;
}

}  // namespace

void AddEvalCommand(Program* program) {
  const auto arguments = std::make_shared<EvalArguments>();
  CLI::App* command =
      program->AddCommand("eval", "measure profiles on a trace: bits, errors, attention, speed",
                          [arguments] { return RunEval(*arguments); });
  command->add_option("TRACE", arguments->trace, "safetensors file")->required();
  command->add_option("--profile", arguments->profiles, "profiles, separated by commas")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Validator(CheckProfile, "PROFILE"));
  arguments->coding.Add(command);
  arguments->basis.Add(command, "calibrated basis (.kvb) of profile kvs2c");
  arguments->backend.AddThreads(command);
  arguments->backend.AddBackend(command);
}

}  // namespace kvshrink::cli
