#include "service/port_file.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "kvshrink/strcat.h"
#include "nlohmann/json.hpp"

namespace kvshrink::service {

absl::Status WritePortFile(const std::string& path, const std::string& listen,
                           const std::string& http) {
  const nlohmann::json content = {{"listen", listen}, {"http", http}};
  const std::string temporary = StrCat(path, ".", getpid(), ".tmp");
  std::ofstream file(temporary, std::ios::trunc);
  file << content.dump() << "\n";
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) {
    std::remove(temporary.c_str());
    return absl::UnavailableError(StrCat("port-file: can't write ", path));
  }
  return absl::OkStatus();
}

}  // namespace kvshrink::service
