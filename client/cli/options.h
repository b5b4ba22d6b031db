// Options that several commands take, with the same names and checks.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "kvshrink/client/basis_file.h"
#include "kvshrink/client/remote.h"
#include "kvshrink/client/trace_codec.h"
#include "kvshrink/codec.h"

namespace kvshrink::cli {

struct ServerArguments {
  client::RemoteOptions options;

  // --server (or KVSHRINK_SERVER), --timeout-ms
  void Add(CLI::App* command);
  absl::StatusOr<std::unique_ptr<client::Remote>> Connect() const;
};

// A run of chunks: their keys are "<prefix>/<index>", index from 0, decimal.
struct PrefixArguments {
  std::string name_space;
  std::string prefix;

  // --namespace, --prefix
  void Add(CLI::App* command, bool required);
};

struct BackendArguments {
  std::string name = "cpu";
  int threads = 0;

  // --threads
  void AddThreads(CLI::App* command);
  // --backend
  void AddBackend(CLI::App* command);
  std::unique_ptr<Backend> Make() const;
};

// Which rotary embedding keys carry.
struct RopeArguments {
  bool of_trace = false;  // and it must have one

  // --rope, which sets `ropes`.
  void Add(CLI::App* command, std::optional<client::LayerRopes>* ropes);
  // What a trace must have for these arguments. Errors: INVALID_ARGUMENT naming the field.
  absl::Status Check(const client::Trace& trace) const;
};

struct BasisArguments {
  std::string path;  // "" = none

  // --basis
  void Add(CLI::App* command, const std::string& description);
  // Null when none was given. Errors: those of OpenBasis.
  absl::StatusOr<std::shared_ptr<const Basis>> Open() const;
};

struct CodingArguments {
  client::CodingSettings settings;
  RopeArguments rope;

  // --chunk-tokens, --raw-tokens, --raw-layers, --max-relative-error, --rope
  void Add(CLI::App* command);
  // --profile
  void AddProfile(CLI::App* command);

 private:
  std::string profile_;
};

// --dtype
void AddDtype(CLI::App* command, std::optional<DType>* dtype, const std::string& description);

// Refuses names of unknown profiles; empty when all is well.
std::string CheckProfile(const std::string& name);

bool EndsWith(const std::string& text, const std::string& ending);

}  // namespace kvshrink::cli
