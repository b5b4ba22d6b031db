// The trellis code alone: its tables, its bytes, and how well its search does.
#include "stages/trellis.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "cpu/trellis_loops.h"
#include "stages/trellis_search.h"

namespace kvshrink::stages {
namespace {

const BlockCode kCodes[] = {BlockCode::kTrellis15, BlockCode::kTrellis20, BlockCode::kTrellis25,
                            BlockCode::kTrellis30};

double Rate(const TrellisCode& code) { return 1 + double{1} * code.free_bits / code.values; }

std::vector<float> Gaussian(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) {
    value = normal(random);
  }
  return values;
}

// What a decoder gets from the entries of a search, and its squared error.
template <typename T>
double ErrorOf(const TrellisCode& code, const uint16_t* entries, const T* x) {
  uint8_t run[kMaxTrellisRunBytes];
  int8_t levels[kRunValues];
  WriteTrellisRun(code, entries, run);
  ReadTrellisRun(code, run, levels);
  double error = 0;
  for (int i = 0; i < kRunValues; ++i) {
    const double difference = static_cast<double>(x[i]) - double{kTrellisUnit} * levels[i];
    error += difference * difference;
  }
  return error;
}

TEST(Trellis, TablesAreTheDocuments) {
  std::ifstream file(std::string(KVSHRINK_SOURCE_DIR) + "/proto/trellis_tables.txt");
  std::map<int, std::vector<int>> printed;
  std::vector<int>* current = nullptr;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("#")) {
      continue;
    }
    if (line.starts_with("code ")) {
      std::istringstream words(line);
      std::string word;
      int number = 0;
      int values = 0;
      int free_bits = 0;
      words >> word >> number >> word >> values >> word >> free_bits;
      const TrellisCode* code = TrellisOf(static_cast<BlockCode>(number));
      ASSERT_NE(code, nullptr) << line;
      EXPECT_EQ(code->values, values) << line;
      EXPECT_EQ(code->free_bits, free_bits) << line;
      current = &printed[number];
      continue;
    }
    ASSERT_NE(current, nullptr);
    std::istringstream numbers(line);
    for (int value = 0; numbers >> value;) {
      current->push_back(value);
    }
  }
  for (const BlockCode number : kCodes) {
    const TrellisCode& code = *TrellisOf(number);
    const std::vector<int>& table = printed[static_cast<int>(number)];
    ASSERT_EQ(table.size(), static_cast<size_t>(code.entries() * code.values));
    for (size_t i = 0; i < table.size(); ++i) {
      ASSERT_EQ(table[i], code.table[i]) << "code " << static_cast<int>(number) << " entry " << i;
    }
  }
}

TEST(Trellis, SizesAreTheRates) {
  EXPECT_EQ(TrellisOf(BlockCode::kTrellis15)->run_bytes(), 24);
  EXPECT_EQ(TrellisOf(BlockCode::kTrellis20)->run_bytes(), 32);
  EXPECT_EQ(TrellisOf(BlockCode::kTrellis25)->run_bytes(), 40);
  EXPECT_EQ(TrellisOf(BlockCode::kTrellis30)->run_bytes(), 48);
  EXPECT_EQ(TrellisOf(BlockCode::kLevels16), nullptr);
  EXPECT_EQ(TrellisOf(static_cast<BlockCode>(36)), nullptr);
  EXPECT_EQ(RunsOf(128), 1U);
  EXPECT_EQ(RunsOf(129), 2U);
}

// Bit by bit as FORMAT.md describes it.
TEST(Trellis, AnyBytesAreRead) {
  std::mt19937 random(5);
  for (const BlockCode number : kCodes) {
    const TrellisCode& code = *TrellisOf(number);
    std::vector<uint8_t> run(static_cast<size_t>(code.run_bytes()));
    for (uint8_t& byte : run) {
      byte = static_cast<uint8_t>(random());
    }
    const auto bit = [&](int i) { return run[static_cast<size_t>(i / 8)] >> (i % 8) & 1; };
    int8_t levels[kRunValues];
    ReadTrellisRun(code, run.data(), levels);
    for (int step = 0; step < code.steps(); ++step) {
      int entry = 0;
      for (int i = 0; i < code.window_bits(); ++i) {
        entry += bit((step * code.values + i) % kRunValues) << i;
      }
      for (int i = 0; i < code.free_bits; ++i) {
        entry += bit(kRunValues + step * code.free_bits + i) << (code.window_bits() + i);
      }
      for (int i = 0; i < code.values; ++i) {
        ASSERT_EQ(levels[step * code.values + i], code.table[entry * code.values + i])
            << Rate(code) << " bits, step " << step;
      }
    }
  }
}

// The search's windows follow each other around, so what it means is what a decoder reads.
TEST(Trellis, WrittenRunsAreReadBack) {
  const auto scratch = std::make_unique<TrellisScratch<float>>();
  for (const BlockCode number : kCodes) {
    const TrellisCode& code = *TrellisOf(number);
    const TrellisBranches<float> branches(code);
    // Plain, constant, huge and zero values.
    std::vector<float> all = Gaussian(4 * kRunValues, 6);
    std::fill(all.begin() + kRunValues, all.begin() + 2 * kRunValues, 0.3F);
    std::fill(all.begin() + 3 * kRunValues, all.end(), 0.0F);
    for (int i = 2 * kRunValues; i < 3 * kRunValues; ++i) {
      all[static_cast<size_t>(i)] *= 30;
    }
    for (size_t start = 0; start < all.size(); start += kRunValues) {
      uint16_t entries[kRunValues];
      SearchTrellisRun(branches, all.data() + start, cpu::ChooseTrellisLoops(), scratch.get(),
                       entries);
      uint8_t run[kMaxTrellisRunBytes];
      int8_t levels[kRunValues];
      WriteTrellisRun(code, entries, run);
      ReadTrellisRun(code, run, levels);
      for (int i = 0; i < kRunValues; ++i) {
        ASSERT_EQ(levels[i], code.table[entries[i / code.values] * code.values + i % code.values]);
      }
    }
  }
}

TEST(Trellis, DistortionOfGaussiansIsNearTheBound) {
  constexpr size_t kRuns = 2000;
  const std::vector<float> x = Gaussian(kRuns * kRunValues, 7);
  const auto scratch = std::make_unique<TrellisScratch<float>>();
  for (const BlockCode number : kCodes) {
    const TrellisCode& code = *TrellisOf(number);
    const TrellisBranches<float> branches(code);
    double error = 0;
    uint16_t entries[kRunValues];
    for (size_t run = 0; run < kRuns; ++run) {
      const float* values = x.data() + run * kRunValues;
      SearchTrellisRun(branches, values, cpu::ChooseTrellisLoops(), scratch.get(), entries);
      error += ErrorOf(code, entries, values);
    }
    const double distortion = error / static_cast<double>(x.size());
    const double bound = std::exp2(-2 * Rate(code));
    std::printf("%.1f bits: distortion %.5f, %.3f times the bound\n", Rate(code), distortion,
                distortion / bound);
    EXPECT_GT(distortion, bound);
    EXPECT_LT(distortion, 1.225 * bound) << Rate(code) << " bits";
    EXPECT_NEAR(distortion, code.distortion, 0.01 * distortion) << Rate(code) << " bits";
  }
}

// The far side of the circle finds the state where it closes.
TEST(Trellis, SearchLosesLittleAgainstAllStartingStates) {
  constexpr size_t kRuns = 24;
  const std::vector<float> narrow = Gaussian(kRuns * kRunValues, 8);
  const std::vector<double> x(narrow.begin(), narrow.end());
  const PlainTrellisLoops<double> loops;
  const auto scratch = std::make_unique<TrellisScratch<double>>();
  for (const BlockCode number : kCodes) {
    const TrellisCode& code = *TrellisOf(number);
    const TrellisBranches<double> branches(code);
    double error = 0;
    double least_error = 0;
    uint16_t entries[kRunValues];
    for (size_t run = 0; run < kRuns; ++run) {
      const double* values = x.data() + run * kRunValues;
      double energy = 0;
      for (int i = 0; i < kRunValues; ++i) {
        energy += values[i] * values[i];
      }
      SearchTrellisRun(branches, values, loops, scratch.get(), entries);
      error += ErrorOf(code, entries, values);
      double least = INFINITY;
      for (int state = 0; state < kTrellisStates; ++state) {
        std::fill(scratch->sums, scratch->sums + kTrellisStates, 1e9);
        scratch->sums[state] = 0;
        loops.Advance(code, scratch->metrics, code.steps(), scratch->sums);
        least = std::min(least, scratch->sums[code.steps() * kTrellisStates + state]);
      }
      least_error += energy + 2 * least;
    }
    EXPECT_GE(error, least_error * (1 - 1e-9));
    EXPECT_LT(error, least_error * 1.005) << Rate(code) << " bits";
  }
}

TEST(Trellis, FastLoopsFindWhatThePlainOnesFind) {
  constexpr size_t kRuns = 50;
  const std::vector<float> x = Gaussian(kRuns * kRunValues, 9);
  const std::vector<double> wide(x.begin(), x.end());
  const auto scratch = std::make_unique<TrellisScratch<float>>();
  const auto wide_scratch = std::make_unique<TrellisScratch<double>>();
  for (const BlockCode number : kCodes) {
    const TrellisCode& code = *TrellisOf(number);
    const TrellisBranches<float> branches(code);
    const TrellisBranches<double> wide_branches(code);
    for (size_t start = 0; start < x.size(); start += kRunValues) {
      uint16_t fast[kRunValues];
      uint16_t plain[kRunValues];
      SearchTrellisRun(branches, x.data() + start, cpu::ChooseTrellisLoops(), scratch.get(), fast);
      SearchTrellisRun(wide_branches, wide.data() + start, PlainTrellisLoops<double>(),
                       wide_scratch.get(), plain);
      const double error = ErrorOf(code, plain, wide.data() + start);
      EXPECT_NEAR(ErrorOf(code, fast, x.data() + start), error, 1e-4 * error);
    }
  }
}

}  // namespace
}  // namespace kvshrink::stages
