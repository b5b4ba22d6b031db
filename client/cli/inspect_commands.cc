// inspect, verify: what a file holds, and whether it is sound.
#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "kvshrink/client/kvs_file.h"
#include "kvshrink/client/status.h"
#include "kvshrink/client/trace_codec.h"
#include "options.h"
#include "program.h"
#include "progress.h"
#include "text.h"

namespace kvshrink::cli {
namespace {

std::string_view CodeName(BlockCode code) {
  switch (code) {
    case BlockCode::kZero:
      return "zero";
    case BlockCode::kRaw:
      return "raw";
    case BlockCode::kFp8:
      return "fp8";
    case BlockCode::kLevels3:
      return "3 levels";
    case BlockCode::kLevels4:
      return "4 levels";
    case BlockCode::kLevels5:
      return "5 levels";
    case BlockCode::kLevels6:
      return "6 levels";
    case BlockCode::kLevels8:
      return "8 levels";
    case BlockCode::kLevels12:
      return "12 levels";
    case BlockCode::kLevels16:
      return "16 levels";
    case BlockCode::kTrellis15:
      return "trellis 1.5 bits";
    case BlockCode::kTrellis20:
      return "trellis 2 bits";
    case BlockCode::kTrellis25:
      return "trellis 2.5 bits";
    case BlockCode::kTrellis30:
      return "trellis 3 bits";
  }
  return "unknown";
}

double BitsPerEntry(uint64_t bytes, uint64_t entries) {
  return entries > 0 ? 8 * static_cast<double>(bytes) / static_cast<double>(entries) : 0;
}

const char* KindName(Kind kind) { return kind == Kind::kKey ? "k" : "v"; }

double BlockBits(const BlockView& block, uint32_t head_dim) {
  return BitsPerEntry(block.bytes(), uint64_t{block.rows} * head_dim);
}

Json BlockJson(const BlockView& block, uint32_t head_dim) {
  return {{"kind", KindName(block.kind)},
          {"head", block.head},
          {"first_row", block.first_row},
          {"rows", block.rows},
          {"raw_rows", block.raw_rows},
          {"code", CodeName(block.code)},
          {"rank", block.rank},
          {"exponent", block.exponent},
          {"factor_bytes", block.factors.size()},
          {"bytes", block.bytes()},
          {"bits_per_entry", BlockBits(block, head_dim)}};
}

// Sizes of a shard's parts and what its blocks are.
struct ShardSummary {
  uint64_t low_bytes = 0;
  uint64_t scales_bytes = 0;
  uint64_t codes_bytes = 0;
  uint64_t rank_sum[2] = {};
  uint32_t blocks[2] = {};
  uint32_t raw_blocks = 0;

  explicit ShardSummary(const Shard& shard) {
    for (const BlockView& block : shard.blocks()) {
      const size_t kind = block.kind == Kind::kKey ? 0 : 1;
      low_bytes += block.raw.size() + block.factors.size();
      scales_bytes += block.scales.size();
      codes_bytes += block.codes.size();
      rank_sum[kind] += block.rank;
      ++blocks[kind];
      raw_blocks += block.code == BlockCode::kRaw ? 1 : 0;
    }
  }

  double mean_rank(size_t kind) const {
    return blocks[kind] > 0 ? static_cast<double>(rank_sum[kind]) / blocks[kind] : 0;
  }
};

// `basis`: the one given, or null. Whether the shard's is it; null when there is nothing to
// compare.
Json BasisMatches(const Shard& shard, const Basis* basis) {
  const auto& id = shard.header().extensions.basis;
  return id && basis != nullptr ? Json(CheckBasisOf(shard.header(), basis).ok()) : Json();
}

std::string BasisCell(const Shard& shard, const Basis* basis) {
  const auto& id = shard.header().extensions.basis;
  const Json matches = BasisMatches(shard, basis);
  const char* verdict = matches.is_null() ? "" : matches.get<bool>() ? " matches" : " differs";
  return id ? BasisIdText(*id) + verdict : "-";
}

Json ShardJson(const client::KvsEntry& entry, const Shard& shard, const Basis* basis) {
  const ShardHeader& header = shard.header();
  const ShardSummary summary(shard);
  Json blocks = Json::array();
  for (const BlockView& block : shard.blocks()) {
    blocks.push_back(BlockJson(block, header.shape.head_dim));
  }
  return {{"chunk", entry.chunk},
          {"layer", header.layer},
          {"offset", entry.offset_bytes},
          {"bytes", shard.bytes()},
          {"profile", GetProfileInfo(header.profile).name},
          {"dtype", DTypeName(header.dtype)},
          {"tokens", header.shape.tokens},
          {"kv_heads", header.shape.kv_heads},
          {"head_dim", header.shape.head_dim},
          {"first_token", header.first_token},
          {"raw_rows", header.raw_rows},
          {"rope", header.extensions.rope ? Json(RopeText(*header.extensions.rope)) : Json()},
          {"keys_only", header.keys_only},
          {"basis", header.extensions.basis ? Json(BasisIdText(*header.extensions.basis)) : Json()},
          {"basis_matches", BasisMatches(shard, basis)},
          {"preview", shard.preview()},
          {"bits_per_entry", BitsPerEntry(shard.bytes(), header.entries())},
          {"sections",
           {{"header_and_index", shard.shared_bytes()},
            {"low", summary.low_bytes},
            {"scales", summary.scales_bytes},
            {"codes", summary.codes_bytes}}},
          {"mean_rank_k", summary.mean_rank(0)},
          {"mean_rank_v", OrNull(!header.keys_only, summary.mean_rank(1))},
          {"raw_blocks", summary.raw_blocks},
          {"blocks", std::move(blocks)}};
}

std::vector<std::string> ShardRow(const client::KvsEntry& entry, const Shard& shard,
                                  const Basis* basis) {
  const ShardHeader& header = shard.header();
  const ShardSummary summary(shard);
  return {StrCat(entry.chunk),
          StrCat(header.layer),
          StrCat(header.first_token),
          StrCat(header.shape.tokens),
          StrCat(header.shape.kv_heads, "x", header.shape.head_dim),
          std::string(GetProfileInfo(header.profile).name),
          std::string(DTypeName(header.dtype)),
          header.extensions.rope ? RopeText(*header.extensions.rope) : "-",
          BasisCell(shard, basis),
          StrCat(shard.bytes()),
          Fixed(BitsPerEntry(shard.bytes(), header.entries()), 3),
          StrCat(shard.shared_bytes()),
          StrCat(summary.low_bytes),
          StrCat(summary.scales_bytes),
          StrCat(summary.codes_bytes),
          Fixed(summary.mean_rank(0), 1),
          header.keys_only ? "-" : Fixed(summary.mean_rank(1), 1),
          StrCat(summary.raw_blocks)};
}

std::vector<std::string> BlockRow(const client::KvsEntry& entry, const Shard& shard,
                                  const BlockView& block) {
  return {StrCat(entry.chunk),     StrCat(entry.layer),
          KindName(block.kind),    StrCat(block.head),
          StrCat(block.first_row), StrCat(block.rows),
          StrCat(block.raw_rows),  std::string(CodeName(block.code)),
          StrCat(block.rank),      StrCat(block.exponent),
          StrCat(block.bytes()),   Fixed(BlockBits(block, shard.header().shape.head_dim), 3)};
}

struct InspectArguments {
  std::string in;
  bool blocks = false;
  BasisArguments basis;
};

absl::StatusOr<Outcome> RunInspect(const InspectArguments& arguments) {
  KVSHRINK_ASSIGN_OR_RETURN(const client::KvsFile file, client::KvsFile::Open(arguments.in));
  KVSHRINK_ASSIGN_OR_RETURN(const auto basis, arguments.basis.Open());
  Table shards({"chunk", "layer", "first", "tokens", "heads", "profile", "dtype", "rope", "basis",
                "bytes", "bits", "index", "low", "scales", "codes", "K rank", "V rank", "raw"},
               0);
  Table blocks({"chunk", "layer", "kind", "head", "row", "rows", "raw rows", "code", "rank",
                "exponent", "bytes", "bits"},
               0);
  Json shards_json = Json::array();
  uint64_t entries = 0;
  KVSHRINK_RETURN_IF_ERROR(
      file.ForEachShard([&](const client::KvsEntry& entry, const Shard& shard) {
        shards_json.push_back(ShardJson(entry, shard, basis.get()));
        shards.Add(ShardRow(entry, shard, basis.get()));
        entries += shard.header().entries();
        for (const BlockView& block : shard.blocks()) {
          if (arguments.blocks) {
            blocks.Add(BlockRow(entry, shard, block));
          }
        }
        return absl::OkStatus();
      }));
  const char* form = file.bare_shard() ? "shard" : "kvs";
  Outcome outcome;
  outcome.object = {{"file", arguments.in},
                    {"form", form},
                    {"bytes", file.bytes()},
                    {"previews", file.previews()},
                    {"chunks", file.chunks()},
                    {"layers", file.layers()},
                    {"bits_per_entry", BitsPerEntry(file.bytes(), entries)},
                    {"metadata", file.metadata()},
                    {"shards", std::move(shards_json)}};
  std::vector<std::pair<std::string, std::string>> facts = {
      {"file", StrCat(arguments.in, ", ", Bytes(file.bytes()))},
      {"form", StrCat(form, file.previews() ? ", low-rank part only" : "")},
      {"chunks x layers", StrCat(file.chunks(), " x ", file.layers().size())},
      {"bits per entry", Fixed(BitsPerEntry(file.bytes(), entries), 3)}};
  for (const auto& [key, value] : file.metadata()) {
    facts.emplace_back(Printable(key), Printable(value));
  }
  outcome.text = StrCat(Facts(facts), "\n", shards.ToString(),
                        arguments.blocks ? StrCat("\n", blocks.ToString()) : "");
  return outcome;
}

struct VerifyArguments {
  std::string in;
  BackendArguments backend;
};

struct Verified {
  uint64_t bytes = 0;
  size_t shards = 0;
  size_t blocks = 0;
};

// Every block as it was coded, so that no basis is needed.
absl::Status DecodeBlocks(const Backend& backend, const Shard& shard, DecodeForm form) {
  const ShardHeader& header = shard.header();
  std::vector<absl::Status> statuses(shard.blocks().size());
  backend.ForEach(statuses.size(), [&](size_t i) {
    const BlockView& block = shard.blocks()[i];
    std::vector<float> rows(size_t{block.coded_rows()} * header.shape.head_dim);
    if (block.code != BlockCode::kRaw) {
      statuses[i] = backend.DecodeBlock(GetProfileInfo(header.profile).family, block,
                                        header.shape.head_dim, form, rows.data());
    }
  });
  const auto bad = std::find_if(statuses.begin(), statuses.end(),
                                [](const absl::Status& status) { return !status.ok(); });
  return bad == statuses.end() ? absl::OkStatus() : *bad;
}

absl::Status VerifyFile(const VerifyArguments& arguments, Verified* verified) {
  KVSHRINK_ASSIGN_OR_RETURN(const client::KvsFile file, client::KvsFile::Open(arguments.in));
  verified->bytes = file.bytes();
  const auto backend = arguments.backend.Make();
  Progress progress("verify", file.bytes());
  return file.ForEachShard([&](const client::KvsEntry& entry, const Shard& shard) -> absl::Status {
    const DecodeForm form = shard.preview() ? DecodeForm::kLowRank : DecodeForm::kFull;
    KVSHRINK_RETURN_IF_ERROR(DecodeBlocks(*backend, shard, form));
    ++verified->shards;
    verified->blocks += shard.blocks().size();
    progress.Update(entry.offset_bytes + entry.length_bytes);
    return absl::OkStatus();
  });
}

absl::StatusOr<Outcome> RunVerify(const VerifyArguments& arguments) {
  Verified verified;
  const absl::Status status = VerifyFile(arguments, &verified);
  // A file that can't be read is another matter than one that is damaged.
  if (!status.ok() && !absl::IsDataLoss(status)) {
    return status;
  }
  Outcome outcome;
  outcome.object = {{"file", arguments.in},      {"ok", status.ok()},
                    {"bytes", verified.bytes},   {"shards", verified.shards},
                    {"blocks", verified.blocks}, {"error", nullptr}};
  if (status.ok()) {
    outcome.text = StrCat(arguments.in, ": sound, ", verified.shards, " shards, ", verified.blocks,
                          " blocks, ", Bytes(verified.bytes), "\n");
  } else {
    outcome.object["error"] = std::string(status.message());
    outcome.text = StrCat(arguments.in, ": DAMAGED after ", verified.shards,
                          " sound shards: ", std::string(status.message()), "\n");
    outcome.exit_code = kExitFailed;
  }
  return outcome;
}

}  // namespace

void AddInspectCommands(Program* program) {
  const auto inspect = std::make_shared<InspectArguments>();
  CLI::App* command = program->AddCommand("inspect", "show what a .kvs file or a shard holds",
                                          [inspect] { return RunInspect(*inspect); });
  command->add_option("IN", inspect->in, ".kvs file or bare shard")->required();
  command->add_flag("--blocks", inspect->blocks, "list every block (always there with --json)");

  inspect->basis.Add(command, "basis (.kvb) to compare with those of kvs2c shards");

  const auto verify = std::make_shared<VerifyArguments>();
  command = program->AddCommand("verify", "check every checksum and decode every block",
                                [verify] { return RunVerify(*verify); });
  command->add_option("IN", verify->in, ".kvs file or bare shard")->required();
  verify->backend.AddThreads(command);
}

}  // namespace kvshrink::cli
