// info: what a server is and how full it is.
#include <memory>
#include <utility>
#include <vector>

#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"
#include "options.h"
#include "program.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

// As BasisIdText, whatever length a server sends.
std::string BasisText(const v1::BasisInfo& basis) {
  std::string text;
  for (const char byte : basis.id()) {
    text += StrCat(absl::Hex(static_cast<uint8_t>(byte), absl::kZeroPad2));
  }
  return text;
}

Json InfoJson(const std::string& server, const v1::ServerInfoResponse& info) {
  Json profiles = Json::array();
  for (const std::string& profile : info.profiles()) {
    profiles.push_back(profile);
  }
  Json tiers = Json::array();
  for (const v1::TierInfo& tier : info.tiers()) {
    tiers.push_back({{"tier", client::TierName(tier.tier())},
                     {"capacity_bytes", tier.capacity_bytes()},
                     {"used_bytes", tier.used_bytes()}});
  }
  Json bases = Json::array();
  for (const v1::BasisInfo& basis : info.bases()) {
    bases.push_back({{"id", BasisText(basis)},
                     {"model", basis.model()},
                     {"head_dim", basis.head_dim()},
                     {"kv_heads", basis.kv_heads()},
                     {"layers", basis.layers()}});
  }
  const auto profile = client::FromProto(info.default_profile());
  return {{"server", server},
          {"version", info.version()},
          {"backend", info.backend()},
          {"device", info.device()},
          {"profiles", std::move(profiles)},
          {"default_profile", profile ? Json(GetProfileInfo(*profile).name) : Json(nullptr)},
          {"max_frame_bytes", info.max_frame_bytes()},
          {"max_object_bytes", info.max_object_bytes()},
          {"inflight_capacity_bytes", info.inflight_capacity_bytes()},
          {"inflight_bytes", info.inflight_bytes()},
          {"tiers", std::move(tiers)},
          {"chunks", info.chunks()},
          {"uncommitted_bytes", info.uncommitted_bytes()},
          {"bases", std::move(bases)},
          {"draining", info.draining()}};
}

std::string InfoText(const std::string& server, const v1::ServerInfoResponse& info) {
  std::vector<std::pair<std::string, std::string>> facts = {
      {"server", StrCat(server, info.draining() ? ", draining" : "")},
      {"version", info.version()},
      {"backend", StrCat(info.backend(), ", ", info.device())},
      {"profiles", ""},
      {"largest object", Bytes(info.max_object_bytes())},
      {"in flight",
       StrCat(Bytes(info.inflight_bytes()), " of ", Bytes(info.inflight_capacity_bytes()))},
      {"chunks", StrCat(info.chunks())},
      {"not committed", Bytes(info.uncommitted_bytes())}};
  for (const std::string& profile : info.profiles()) {
    facts[3].second += StrCat(facts[3].second.empty() ? "" : " ", profile);
  }
  for (const v1::TierInfo& tier : info.tiers()) {
    facts.emplace_back(StrCat("tier ", client::TierName(tier.tier())),
                       StrCat(Bytes(tier.used_bytes()), " of ", Bytes(tier.capacity_bytes())));
  }
  for (const v1::BasisInfo& basis : info.bases()) {
    facts.emplace_back(
        "basis", StrCat(BasisText(basis), ", ", Printable(basis.model()), ", ", basis.layers_size(),
                        " layers of ", basis.kv_heads(), "x", basis.head_dim()));
  }
  return Facts(facts);
}

absl::StatusOr<Outcome> RunInfo(const ServerArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.Connect());
  KVSHRINK_ASSIGN_OR_RETURN(const v1::ServerInfoResponse info, remote->Info());
  Outcome outcome;
  outcome.object = InfoJson(arguments.options.server, info);
  outcome.text = InfoText(arguments.options.server, info);
  return outcome;
}

}  // namespace

void AddInfoCommand(Program* program) {
  const auto arguments = std::make_shared<ServerArguments>();
  CLI::App* command = program->AddCommand("info", "what the server is and how full",
                                          [arguments] { return RunInfo(*arguments); });
  arguments->Add(command);
}

}  // namespace kvshrink::cli
