#include "program.h"

#include <cstdio>
#include <utility>

#include "kvshrink/client/status.h"

namespace kvshrink::cli {
namespace {

void PrintTo(std::FILE* stream, const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stream);
  std::fflush(stream);
}

// Names of files and keys may hold any bytes.
std::string Dump(const Json& object) {
  return object.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

Program::Program()
    : app_("Compresses the KV cache of language models; speaks to kvshrinkd.", "kvshrink") {
  app_.require_subcommand(1);
  app_.set_version_flag("--version", KVSHRINK_VERSION);
}

CLI::App* Program::AddCommand(const std::string& name, const std::string& description,
                              Action action) {
  CLI::App* command = app_.add_subcommand(name, description);
  command->add_flag("--json", json_, "print one JSON object");
  command->callback([this, name, action = std::move(action)] {
    command_ = name;
    action_ = action;
  });
  return command;
}

int Program::Run(int argc, const char* const* argv) {
  try {
    app_.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app_.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  return Print(action_());
}

int Program::Print(const absl::StatusOr<Outcome>& outcome) const {
  if (outcome.ok()) {
    PrintTo(stdout, json_ ? Dump(outcome->object) : outcome->text);
    return std::ferror(stdout) ? kExitFailed : outcome->exit_code;
  }
  const std::string code = absl::StatusCodeToString(outcome.status().code());
  const std::string message(outcome.status().message());
  PrintTo(stderr, StrCat("kvshrink ", command_, ": ", message, " (", code, ")\n"));
  if (json_) {
    PrintTo(stdout, Dump({{"error", {{"code", code}, {"message", message}}}}));
  }
  return kExitFailed;
}

}  // namespace kvshrink::cli
