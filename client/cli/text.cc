#include "text.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_format.h"

namespace kvshrink::cli {

Table::Table(std::vector<std::string> header, size_t left_columns) : left_columns_(left_columns) {
  rows_.push_back(std::move(header));
}

void Table::Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

std::string Table::ToString() const {
  std::vector<size_t> widths(rows_[0].size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - row[i].size(), ' ');
      line += (i > 0 ? "  " : "") + (i < left_columns_ ? row[i] + padding : padding + row[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string Facts(const std::vector<std::pair<std::string, std::string>>& facts) {
  size_t width = 0;
  for (const auto& [name, value] : facts) {
    width = std::max(width, name.size());
  }
  std::string text;
  for (const auto& [name, value] : facts) {
    text.append(name).append(width - name.size() + 2, ' ').append(value).append("\n");
  }
  return text;
}

std::string Fixed(double value, int digits) { return absl::StrFormat("%.*f", digits, value); }

std::string Short(double value) { return absl::StrFormat("%.3g", value); }

std::string OrDash(bool there, double value) { return there ? Short(value) : "-"; }

std::string Bytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto size = static_cast<double>(bytes);
  size_t unit = 0;
  while (size >= 1024 && unit + 1 < std::size(kUnits)) {
    size /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.*f %s", unit == 0 ? 0 : 2, size, kUnits[unit]);
}

std::string Printable(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) {
    const auto code = static_cast<unsigned char>(byte);
    text += code >= 0x20 && code < 0x7F && byte != '\\' ? std::string(1, byte)
                                                        : absl::StrFormat("\\x%02x", code);
  }
  return text;
}

double MbPerSecond(uint64_t bytes, double seconds) {
  return seconds > 0 ? static_cast<double>(bytes) / 1e6 / seconds : 0;
}

}  // namespace kvshrink::cli
