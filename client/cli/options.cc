#include "options.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "kvshrink/client/chunk_keys.h"
#include "kvshrink/client/status.h"

namespace kvshrink::cli {
namespace {

constexpr int kMaxThreads = 1024;
constexpr std::string_view kRopeOfTrace = "trace";

std::string ProfileNames() {
  std::string names;
  for (const ProfileInfo& info : AllProfiles()) {
    names += StrCat(names.empty() ? "" : ", ", info.name);
  }
  return names;
}

// A range lets a NaN through.
std::string CheckNotNan(const std::string& text) {
  const bool nan = std::isnan(std::strtod(text.c_str(), nullptr));
  return nan ? StrCat("'", text, "' must be a number") : "";
}

std::string CheckHostPort(const std::string& server) {
  const size_t colon = server.rfind(':');
  const bool unix_socket = server.rfind("unix:", 0) == 0;
  if (unix_socket || (colon != std::string::npos && colon > 0 && colon + 1 < server.size())) {
    return "";
  }
  return StrCat("'", server, "' must be host:port or unix:path");
}

std::string CheckRope(const std::string& text) {
  const auto ropes = client::LayerRopes::Parse(text);
  return text == kRopeOfTrace || ropes.ok() ? "" : std::string(ropes.status().message());
}

}  // namespace

void ServerArguments::Add(CLI::App* command) {
  command->add_option("--server", options.server, "address of kvshrinkd, host:port")
      ->envname("KVSHRINK_SERVER")
      ->capture_default_str()
      ->check(CLI::Validator(CheckHostPort, "HOST:PORT"));
  command
      ->add_option_function<int64_t>(
          "--timeout-ms",
          [this](const int64_t& value) {
            options.call_timeout_ms = value;
            options.idle_timeout_ms = value;
          },
          "how long to wait for an answer, or for progress on a stream")
      ->check(CLI::Range(int64_t{1}, int64_t{24} * 3600 * 1000));
}

absl::StatusOr<std::unique_ptr<client::Remote>> ServerArguments::Connect() const {
  return client::Remote::Create(options);
}

void PrefixArguments::Add(CLI::App* command, bool required) {
  const auto check = [](auto checker, const char* name) {
    return CLI::Validator(
        [checker](const std::string& value) {
          const absl::Status status = checker(value);
          return status.ok() ? std::string() : std::string(status.message());
        },
        name);
  };
  command->add_option("--namespace", name_space, "model, revision, dtype, rank: one name")
      ->required(required)
      ->check(check(client::CheckNamespace, "NAME"));
  command->add_option("--prefix", prefix, "of the chunks' keys: <prefix>/<index>")
      ->required(required)
      ->check(check(client::CheckPrefix, "KEY"));
}

void BackendArguments::AddThreads(CLI::App* command) {
  command->add_option("--threads", threads, "0 = one per core")
      ->capture_default_str()
      ->check(CLI::Range(0, kMaxThreads));
}

void BackendArguments::AddBackend(CLI::App* command) {
  command->add_option("--backend", name, "cpu, or reference: scalar and double, slow")
      ->capture_default_str()
      ->check(CLI::IsMember({"cpu", "reference"}));
}

std::unique_ptr<Backend> BackendArguments::Make() const {
  return name == "reference" ? MakeReferenceBackend() : MakeCpuBackend(threads);
}

void CodingArguments::Add(CLI::App* command) {
  command->add_option("--chunk-tokens", settings.chunk_tokens, "tokens of a chunk")
      ->capture_default_str()
      ->check(CLI::Range(1U, kMaxTokens));
  command->add_option_function<uint32_t>(
      "--raw-tokens", [this](const uint32_t& value) { settings.raw_tokens = value; },
      StrCat("first tokens that are kept exactly (default: the trace's, else ", kDefaultRawTokens,
             ")"));
  command
      ->add_option("--raw-layers", settings.raw_layers,
                   "so many first and so many last layers take the profile raw")
      ->capture_default_str()
      ->check(CLI::Range(0U, kMaxLayer + 1));
  command
      ->add_option("--max-relative-error", settings.max_relative_error,
                   "bound on a block's sum of squared error / sum of squares; 0 = none")
      ->capture_default_str()
      ->check(CLI::Range(0.0, std::numeric_limits<double>::max()))
      ->check(CLI::Validator(CheckNotNan, "NUMBER"));
  command
      ->add_option("--bits", settings.bits_per_entry,
                   "bits per entry that every shard keeps to, every byte counted: alphabets and "
                   "ranks are chosen over its blocks (kvs profiles); 0 = the profile's own")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 64.0))
      ->check(CLI::Validator(CheckNotNan, "NUMBER"));
  command->add_flag("--fixed-size", settings.fixed_size,
                    "with --bits: all shards of a shape have the same size");
  rope.Add(command, &settings.ropes);
}

void RopeArguments::Add(CLI::App* command, std::optional<client::LayerRopes>* ropes) {
  command
      ->add_option_function<std::string>(
          "--rope",
          [this, ropes](const std::string& text) {
            of_trace = text == kRopeOfTrace;
            *ropes = of_trace ? std::nullopt : std::optional(*client::LayerRopes::Parse(text));
          },
          "rotary embedding that K carries, so that it is coded before it: theta=1e6,dim=64,"
          "pairing=neox|gptj,scaling=none|linear|ntk|yarn|yarn-untruncated|llama3,factor=..., with "
          "theta@5/11/17=1e4 for some layers; 'trace': as its metadata say; 'none' (default: the "
          "trace's, else none)")
      ->check(CLI::Validator(CheckRope, "ROPE"));
}

absl::Status RopeArguments::Check(const client::Trace& trace) const {
  if (of_trace && trace.ropes().empty()) {
    return BadArgument("rope", kRopeOfTrace, "the trace's metadata has no rope_theta");
  }
  return absl::OkStatus();
}

void BasisArguments::Add(CLI::App* command, const std::string& description) {
  command->add_option("--basis", path, description);
}

absl::StatusOr<std::shared_ptr<const Basis>> BasisArguments::Open() const {
  if (path.empty()) {
    return std::shared_ptr<const Basis>();
  }
  return client::OpenBasis(path);
}

void CodingArguments::AddProfile(CLI::App* command) {
  profile_ = GetProfileInfo(kDefaultProfile).name;
  command
      ->add_option_function<std::string>(
          "--profile",
          [this](const std::string& name) { settings.profile = *ProfileFromName(name); },
          StrCat("one of ", ProfileNames()))
      ->default_str(profile_)
      ->check(CLI::Validator(CheckProfile, "PROFILE"));
}

void AddDtype(CLI::App* command, std::optional<DType>* dtype, const std::string& description) {
  command
      ->add_option_function<std::string>(
          "--dtype", [dtype](const std::string& name) { *dtype = DTypeFromName(name); },
          description)
      ->check(CLI::IsMember({"fp32", "fp16", "bf16", "fp8_e4m3"}));
}

std::string CheckProfile(const std::string& name) {
  return ProfileFromName(name)
             ? ""
             : StrCat("profile '", name, "' is unknown: must be one of ", ProfileNames());
}

bool EndsWith(const std::string& text, const std::string& ending) {
  return text.size() >= ending.size() &&
         text.compare(text.size() - ending.size(), ending.size(), ending) == 0;
}

}  // namespace kvshrink::cli
