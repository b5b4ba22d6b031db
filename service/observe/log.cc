#include "service/observe/log.h"

#include <memory>

#include "absl/strings/escaping.h"
#include "kvshrink/error.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace kvshrink::service {

absl::Status SetUpLog(std::string_view level) {
  spdlog::level::level_enum value = spdlog::level::info;
  if (level == "debug") {
    value = spdlog::level::debug;
  } else if (level == "warn") {
    value = spdlog::level::warn;
  } else if (level == "error") {
    value = spdlog::level::err;
  } else if (level == "off") {
    value = spdlog::level::off;
  } else if (level != "info") {
    return BadArgument("log-level", level, "must be debug, info, warn, error or off");
  }
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  auto logger = std::make_shared<spdlog::logger>("kvshrinkd", std::move(sink));
  logger->set_level(value);
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%eZ %l %v", spdlog::pattern_time_type::utc);
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

std::string Printable(std::string_view bytes) {
  return absl::CHexEscape({bytes.data(), bytes.size()});
}

}  // namespace kvshrink::service
