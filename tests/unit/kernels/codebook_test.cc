// The tables are Lloyd-Max quantisers of N(0, 1), and the ones that FORMAT.md prints.
#include "stages/codebook.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <sstream>
#include <vector>

namespace kvshrink::stages {
namespace {

double Density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }
double Below(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

std::vector<Codebook> AllCodebooks() {
  std::vector<Codebook> all = {kLevels3, kLevels5, kLevels6, kLevels12};
  all.insert(all.end(), kFactorCodebooks.begin(), kFactorCodebooks.end());
  return all;
}

struct Cell {
  double mean = 0;
  double mass = 0;
  double second_moment = 0;
};

Cell CellOf(double low, double high) {
  Cell cell;
  cell.mass = low > 0 ? Below(-low) - Below(-high) : Below(high) - Below(low);
  cell.mean = (Density(low) - Density(high)) / cell.mass;
  const auto edge = [](double x) { return std::isinf(x) ? 0.0 : x * Density(x); };
  cell.second_moment = cell.mass + edge(low) - edge(high);
  return cell;
}

TEST(Codebook, LevelsAreTheMeansOfTheirCells) {
  for (const Codebook& codebook : AllCodebooks()) {
    double distortion = 0;
    for (int i = 0; i < codebook.levels; ++i) {
      const double low = i == 0 ? -INFINITY : static_cast<double>(codebook.threshold[i - 1]);
      const double high =
          i + 1 == codebook.levels ? INFINITY : static_cast<double>(codebook.threshold[i]);
      const Cell cell = CellOf(low, high);
      const auto level = static_cast<double>(codebook.level[i]);
      // Thresholds and levels are floats; at 256 levels a cell is 0.017 wide and its mean moves by
      // half of what its edges move.
      EXPECT_NEAR(cell.mean, level, 1e-6 * std::max(1.0, std::abs(level)))
          << codebook.levels << " levels, digit " << i;
      distortion +=
          cell.second_moment - 2 * level * cell.mean * cell.mass + level * level * cell.mass;
    }
    EXPECT_NEAR(distortion, codebook.distortion, 1e-6 * distortion + 1e-9) << codebook.levels;
  }
}

TEST(Codebook, ThresholdsAreMidpoints) {
  for (const Codebook& codebook : AllCodebooks()) {
    for (int i = 0; i + 1 < codebook.levels; ++i) {
      EXPECT_LT(codebook.level[i], codebook.level[i + 1]);
      EXPECT_FLOAT_EQ(codebook.threshold[i], (codebook.level[i] + codebook.level[i + 1]) / 2);
    }
  }
}

TEST(Codebook, NearestDigitIsNearest) {
  for (const Codebook& codebook : AllCodebooks()) {
    for (double x = -5; x <= 5; x += 0.00371) {
      const int digit = NearestDigit(codebook, x);
      for (int i = 0; i < codebook.levels; ++i) {
        EXPECT_LE(std::abs(x - static_cast<double>(codebook.level[digit])),
                  std::abs(x - static_cast<double>(codebook.level[i])) + 1e-6);
      }
    }
  }
}

TEST(Codebook, FormatDocumentPrintsTheSameNumbers) {
  std::ifstream file(std::string(KVSHRINK_SOURCE_DIR) + "/proto/FORMAT.md");
  std::map<int, std::vector<float>> printed;
  std::vector<float>* current = nullptr;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("```")) {
      inside = line == "```levels";
      continue;
    }
    if (!inside) {
      continue;
    }
    if (line.ends_with(":")) {
      current = &printed[std::stoi(line)];
      continue;
    }
    ASSERT_NE(current, nullptr);
    std::istringstream numbers(line);
    for (float value = 0; numbers >> value;) {
      current->push_back(value);
    }
  }
  for (const Codebook& codebook : AllCodebooks()) {
    const std::vector<float>& levels = printed[codebook.levels];
    ASSERT_EQ(levels.size(), static_cast<size_t>((codebook.levels + 1) / 2)) << codebook.levels;
    for (size_t i = 0; i < levels.size(); ++i) {
      EXPECT_EQ(levels[i], codebook.level[static_cast<size_t>(codebook.levels / 2) + i])
          << codebook.levels;
    }
  }
}

}  // namespace
}  // namespace kvshrink::stages
