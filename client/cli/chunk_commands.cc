// lookup, ls, stat, delete: chunks as a server keeps them.
#include <memory>
#include <utility>
#include <vector>

#include "kvshrink/client/chunk_keys.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/wire.h"
#include "options.h"
#include "program.h"
#include "stored_run.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

struct ChunkArguments {
  std::string key;  // one chunk by its own name instead of a prefix
  ServerArguments server;
  PrefixArguments run;
};

std::string Tiers(const v1::ChunkInfo& chunk) {
  std::string names;
  for (const int tier : chunk.tiers()) {
    names += StrCat(names.empty() ? "" : ",", client::TierName(static_cast<v1::Tier>(tier)));
  }
  return names;
}

Json ChunkJson(const v1::ChunkInfo& chunk) {
  Json tiers = Json::array();
  for (const int tier : chunk.tiers()) {
    tiers.push_back(client::TierName(static_cast<v1::Tier>(tier)));
  }
  return {{"namespace", chunk.id().namespace_()},
          {"key", Printable(chunk.id().key())},
          {"committed", chunk.committed()},
          {"layers", chunk.layers()},
          {"layers_present", chunk.layers_present()},
          {"tokens", chunk.tokens()},
          {"raw_bytes", chunk.raw_bytes()},
          {"bytes", chunk.bytes()},
          {"tiers", std::move(tiers)},
          {"leased", chunk.leased()},
          {"created_unix_ms", chunk.created_unix_ms()}};
}

Table ChunkTable() {
  return Table({"namespace", "key", "tokens", "layers", "raw", "stored", "tiers", "state"}, 2);
}

std::vector<std::string> ChunkRow(const v1::ChunkInfo& chunk) {
  return {Printable(chunk.id().namespace_()),
          Printable(chunk.id().key()),
          StrCat(chunk.tokens()),
          StrCat(chunk.layers_present(), "/", chunk.layers()),
          Bytes(chunk.raw_bytes()),
          Bytes(chunk.bytes()),
          Tiers(chunk),
          StrCat(chunk.committed() ? "committed" : "open", chunk.leased() ? ", leased" : "")};
}

absl::StatusOr<Outcome> RunLookup(const ChunkArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  KVSHRINK_ASSIGN_OR_RETURN(
      const StoredRun run,
      StoredRun::Find(remote.get(), arguments.run.name_space, arguments.run.prefix));
  Outcome outcome;
  outcome.object = {{"namespace", arguments.run.name_space},
                    {"prefix", arguments.run.prefix},
                    {"present", run.keys().size()},
                    {"tokens", run.tokens()}};
  outcome.text = StrCat(run.keys().size(), " chunks, ", run.tokens(), " tokens\n");
  return outcome;
}

absl::StatusOr<Outcome> RunList(const ChunkArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  Table table = ChunkTable();
  Json chunks = Json::array();
  KVSHRINK_RETURN_IF_ERROR(
      remote->List(arguments.run.name_space, [&](const v1::ChunkInfo& chunk) -> absl::Status {
        if (arguments.run.prefix.empty() ||
            client::ChunkIndex(arguments.run.prefix, chunk.id().key())) {
          chunks.push_back(ChunkJson(chunk));
          table.Add(ChunkRow(chunk));
        }
        return absl::OkStatus();
      }));
  Outcome outcome;
  outcome.text = chunks.empty() ? "no chunks\n" : table.ToString();
  outcome.object = {{"chunks", std::move(chunks)}};
  return outcome;
}

// Chunks "<prefix>/0", ... up to the first that is not there, committed or not; or the one of the
// key.
absl::StatusOr<std::vector<v1::StatResponse>> StatChunks(const ChunkArguments& arguments,
                                                         client::Remote* remote) {
  std::vector<v1::StatResponse> chunks;
  if (!arguments.key.empty()) {
    KVSHRINK_ASSIGN_OR_RETURN(v1::StatResponse chunk,
                              remote->Stat(arguments.run.name_space, arguments.key));
    chunks.push_back(std::move(chunk));
    return chunks;
  }
  while (true) {
    const auto index = static_cast<uint32_t>(chunks.size());
    auto chunk =
        remote->Stat(arguments.run.name_space, client::ChunkKey(arguments.run.prefix, index));
    if (!chunk.ok() && (index == 0 || !absl::IsNotFound(chunk.status()))) {
      return chunk.status();
    }
    if (!chunk.ok()) {
      return chunks;
    }
    chunks.push_back(*std::move(chunk));
  }
}

Json ShardJson(const v1::ShardInfo& shard) {
  const auto profile = client::FromProto(shard.profile());
  const auto dtype = client::FromProto(shard.dtype());
  return {{"layer", shard.layer()},
          {"profile", profile ? Json(GetProfileInfo(*profile).name) : Json(nullptr)},
          {"dtype", dtype ? Json(DTypeName(*dtype)) : Json(nullptr)},
          {"tokens", shard.shape().tokens()},
          {"kv_heads", shard.shape().kv_heads()},
          {"head_dim", shard.shape().head_dim()},
          {"first_token", shard.first_token()},
          {"bytes", shard.bytes()}};
}

absl::StatusOr<Outcome> RunStat(const ChunkArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  KVSHRINK_ASSIGN_OR_RETURN(const std::vector<v1::StatResponse> stats,
                            StatChunks(arguments, remote.get()));
  Table table = ChunkTable();
  Json chunks = Json::array();
  for (const v1::StatResponse& stat : stats) {
    Json chunk = ChunkJson(stat.chunk());
    Json shards = Json::array();
    for (const v1::ShardInfo& shard : stat.shards()) {
      shards.push_back(ShardJson(shard));
    }
    chunk["shards"] = std::move(shards);
    chunks.push_back(std::move(chunk));
    table.Add(ChunkRow(stat.chunk()));
  }
  Outcome outcome;
  outcome.object = {{"chunks", std::move(chunks)}};
  outcome.text = table.ToString();
  return outcome;
}

absl::StatusOr<std::vector<std::string>> KeysToDelete(const ChunkArguments& arguments,
                                                      client::Remote* remote) {
  std::vector<std::string> keys;
  if (!arguments.key.empty()) {
    keys.push_back(arguments.key);
    return keys;
  }
  // Every committed chunk of the prefix, also behind a gap.
  KVSHRINK_RETURN_IF_ERROR(
      remote->List(arguments.run.name_space, [&](const v1::ChunkInfo& chunk) -> absl::Status {
        if (client::ChunkIndex(arguments.run.prefix, chunk.id().key())) {
          keys.push_back(chunk.id().key());
        }
        return absl::OkStatus();
      }));
  if (keys.empty()) {
    return absl::NotFoundError(StrCat("namespace '", arguments.run.name_space,
                                      "' has no committed chunk of prefix '", arguments.run.prefix,
                                      "'"));
  }
  return keys;
}

absl::StatusOr<Outcome> RunDelete(const ChunkArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const auto remote, arguments.server.Connect());
  KVSHRINK_ASSIGN_OR_RETURN(const std::vector<std::string> keys,
                            KeysToDelete(arguments, remote.get()));
  KVSHRINK_ASSIGN_OR_RETURN(const std::vector<absl::Status> statuses,
                            remote->Delete(arguments.run.name_space, keys));
  Outcome outcome;
  Json failed = Json::array();
  for (size_t i = 0; i < keys.size(); ++i) {
    if (!statuses[i].ok()) {
      const std::string message(statuses[i].message());
      failed.push_back({{"key", Printable(keys[i])},
                        {"code", absl::StatusCodeToString(statuses[i].code())},
                        {"message", message}});
      outcome.text += StrCat(Printable(keys[i]), ": ", message, "\n");
      outcome.exit_code = kExitFailed;
    }
  }
  const size_t deleted = keys.size() - failed.size();
  outcome.text += StrCat(deleted, " chunks deleted\n");
  outcome.object = {
      {"namespace", arguments.run.name_space}, {"deleted", deleted}, {"failed", std::move(failed)}};
  return outcome;
}

// --prefix or --key, one of them.
void AddKey(CLI::App* command, ChunkArguments* arguments) {
  arguments->run.Add(command, false);
  command->get_option("--namespace")->required();
  CLI::Option* prefix = command->get_option("--prefix");
  CLI::Option* key =
      command->add_option("--key", arguments->key, "one chunk, by its whole key")->excludes(prefix);
  command->parse_complete_callback([prefix, key] {
    if (prefix->count() == 0 && key->count() == 0) {
      throw CLI::RequiredError("--prefix or --key");
    }
  });
}

}  // namespace

void AddChunkCommands(Program* program) {
  const auto lookup = std::make_shared<ChunkArguments>();
  CLI::App* command = program->AddCommand("lookup", "how much of a prefix is stored",
                                          [lookup] { return RunLookup(*lookup); });
  lookup->server.Add(command);
  lookup->run.Add(command, true);

  const auto list = std::make_shared<ChunkArguments>();
  command = program->AddCommand("ls", "list committed chunks", [list] { return RunList(*list); });
  list->server.Add(command);
  list->run.Add(command, false);

  const auto stat = std::make_shared<ChunkArguments>();
  command = program->AddCommand("stat", "chunks and their shards, committed or not",
                                [stat] { return RunStat(*stat); });
  stat->server.Add(command);
  AddKey(command, stat.get());

  const auto remove = std::make_shared<ChunkArguments>();
  command = program->AddCommand("delete", "delete chunks", [remove] { return RunDelete(*remove); });
  remove->server.Add(command);
  AddKey(command, remove.get());
}

}  // namespace kvshrink::cli
