// Text for people: aligned tables, sizes, numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvshrink::cli {

// Rows of cells under a header, columns two spaces apart: the first `left_columns` aligned left,
// the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> header, size_t left_columns = 1);
  void Add(std::vector<std::string> row);
  std::string ToString() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  size_t left_columns_;
};

// "name: value" lines with the values below each other.
std::string Facts(const std::vector<std::pair<std::string, std::string>>& facts);

std::string Fixed(double value, int digits);
// Three significant digits, for errors.
std::string Short(double value);
// The same of what is there, "-" of what isn't.
std::string OrDash(bool there, double value);
std::string Bytes(uint64_t bytes);  // "1.50 MiB"
// Printable, whatever bytes a key has: others as \xNN.
std::string Printable(const std::string& bytes);

// Raw bytes per second in MB (10^6); 0 when no time has passed.
double MbPerSecond(uint64_t bytes, double seconds);

}  // namespace kvshrink::cli
