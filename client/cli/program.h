// What the subcommands have in common: registration, one result as JSON or text, exit codes.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace kvshrink::cli {

using Json = nlohmann::ordered_json;

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;

// What a command found, for programs and for people.
struct Outcome {
  Json object = Json::object();
  std::string text;  // ends with a line break, or is empty
  int exit_code = kExitOk;
};

// A number, or null where there is nothing to measure.
inline Json OrNull(bool there, double value) { return there ? Json(value) : Json(nullptr); }

// The command line: parses, runs one command, prints its outcome. A command that fails prints its
// error on stderr and, with --json, as
// {"error": {"code", "message"}} on stdout.
class Program {
 public:
  using Action = std::function<absl::StatusOr<Outcome>()>;

  Program();

  // A subcommand with --json; `action` runs after parsing, when options bound to its variables are
  // set.
  CLI::App* AddCommand(const std::string& name, const std::string& description, Action action);

  // Exit code.
  int Run(int argc, const char* const* argv);

 private:
  int Print(const absl::StatusOr<Outcome>& outcome) const;

  CLI::App app_;
  std::string command_;
  Action action_;
  bool json_ = false;
};

// Registrations, one file per group.
void AddEncodeCommands(Program* program);    // encode, decode
void AddEvalCommand(Program* program);       // eval
void AddCalibrateCommand(Program* program);  // calibrate
void AddInspectCommands(Program* program);   // inspect, verify
void AddPutCommand(Program* program);        // put
void AddGetCommand(Program* program);        // get
void AddAttendCommand(Program* program);     // attend
void AddChunkCommands(Program* program);     // lookup, ls, stat, delete
void AddInfoCommand(Program* program);       // info

}  // namespace kvshrink::cli
