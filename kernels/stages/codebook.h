// Lloyd-Max quantisers of N(0, 1) with a fixed set of alphabets. The same numbers stand in
// proto/FORMAT.md section 7; a unit test derives them again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "stages/portable.h"

namespace kvshrink::stages {

// Levels that are not negative, ascending.
inline constexpr float kPositiveLevels3[] = {
    0.0f,
    1.22400641f,
};
inline constexpr float kPositiveLevels4[] = {
    0.452780038f,
    1.51041758f,
};
inline constexpr float kPositiveLevels5[] = {
    0.0f,
    0.764567554f,
    1.72414744f,
};
inline constexpr float kPositiveLevels6[] = {
    0.31771636f,
    1.0001061f,
    1.89359486f,
};
inline constexpr float kPositiveLevels8[] = {
    0.24509418f,
    0.756005287f,
    1.34390926f,
    2.15194559f,
};
inline constexpr float kPositiveLevels12[] = {
    0.168437749f, 0.511846483f, 0.876779497f, 1.28571129f, 1.78302991f, 2.49843526f,
};
inline constexpr float kPositiveLevels16[] = {
    0.128395036f, 0.388048291f, 0.656759143f, 0.942340434f,
    1.25623119f,  1.6180464f,   2.06901717f,  2.73258948f,
};
inline constexpr float kPositiveLevels32[] = {
    0.0658896565f, 0.198051825f, 0.331378311f, 0.466699511f, 0.604933619f, 0.747135699f,
    0.894565105f,  1.0487833f,   1.21180439f,  1.38634038f,  1.57622802f,  1.78723323f,
    2.02872849f,   2.31773949f,  2.69111967f,  3.26073241f,
};
inline constexpr float kPositiveLevels64[] = {
    0.0334095061f, 0.100278288f, 0.167296901f, 0.234566987f, 0.302192837f, 0.37028265f,
    0.438949674f,  0.508313775f, 0.578503013f, 0.649655581f, 0.721921921f, 0.795467675f,
    0.870476604f,  0.947154939f, 1.02573633f,  1.10648823f,  1.18972015f,  1.27579451f,
    1.36514103f,   1.45827639f,  1.55583119f,  1.65858889f,  1.76754189f,  1.88397729f,
    2.00961113f,   2.14681029f,  2.29898119f,  2.47130489f,  2.67227387f,  2.9174068f,
    3.24043703f,   3.74410129f,
};
inline constexpr float kPositiveLevels128[] = {
    0.01682817f,  0.0504908636f, 0.0841726437f, 0.117886283f, 0.151644647f, 0.185460716f,
    0.219347641f, 0.253318727f,  0.28738755f,   0.321567953f, 0.355874032f, 0.390320301f,
    0.424921662f, 0.459693432f,  0.494651467f,  0.529812217f, 0.56519264f,  0.600810528f,
    0.636684299f, 0.672833323f,  0.709277868f,  0.746039152f, 0.783139646f, 0.820602953f,
    0.858454227f, 0.896719933f,  0.9354285f,    0.974609971f, 1.01429665f,  1.05452323f,
    1.09532666f,  1.13674736f,   1.1788286f,    1.22161746f,  1.26516509f,  1.30952764f,
    1.35476625f,  1.40094852f,   1.44814897f,   1.49644995f,  1.54594374f,  1.59673309f,
    1.64893389f,  1.70267701f,   1.75811148f,   1.81540775f,  1.87476254f,  1.93640459f,
    2.00060177f,  2.06767154f,   2.13799334f,   2.21202755f,  2.29033923f,  2.37363434f,
    2.46281147f,  2.55904055f,   2.66388655f,   2.77951431f,  2.90904713f,  3.05724621f,
    3.23193312f,  3.44743037f,   3.73493671f,   4.18969393f,
};
inline constexpr float kPositiveLevels256[] = {
    0.0084461933f, 0.0253393836f, 0.0422349833f, 0.0591346025f, 0.0760398582f, 0.0929523557f,
    0.10987372f,   0.126805589f,  0.143749565f,  0.160707325f,  0.177680492f,  0.194670752f,
    0.211679757f,  0.228709206f,  0.245760784f,  0.262836218f,  0.279937238f,  0.297065586f,
    0.314223051f,  0.331411391f,  0.348632425f,  0.365888f,     0.383179963f,  0.400510222f,
    0.417880654f,  0.435293198f,  0.452749878f,  0.470252663f,  0.487803608f,  0.50540477f,
    0.523058295f,  0.540766299f,  0.558531046f,  0.576354682f,  0.594239593f,  0.612188101f,
    0.630202591f,  0.648285508f,  0.666439414f,  0.684666753f,  0.702970266f,  0.721352637f,
    0.739816606f,  0.758365035f,  0.777000844f,  0.795727015f,  0.814546704f,  0.833463013f,
    0.852479279f,  0.871598899f,  0.890825272f,  0.910162032f,  0.929612935f,  0.949181795f,
    0.968872607f,  0.988689363f,  1.00863647f,   1.02871823f,   1.04893923f,   1.06930423f,
    1.08981812f,   1.11048603f,   1.1313132f,    1.15230536f,   1.17346823f,   1.19480765f,
    1.21632993f,   1.23804176f,   1.25994992f,   1.28206146f,   1.30438399f,   1.32692528f,
    1.34969366f,   1.37269759f,   1.39594638f,   1.41944933f,   1.44321656f,   1.46725869f,
    1.49158704f,   1.51621318f,   1.54114962f,   1.56640983f,   1.59200752f,   1.61795783f,
    1.6442765f,    1.67098033f,   1.69808745f,   1.72561693f,   1.75358939f,   1.78202689f,
    1.81095314f,   1.8403933f,    1.87037516f,   1.90092802f,   1.9320842f,    1.96387839f,
    1.9963485f,    2.02953577f,   2.06348515f,   2.09824657f,   2.13387418f,   2.17042828f,
    2.20797539f,   2.2465899f,    2.28635454f,   2.32736182f,   2.36971712f,   2.41353869f,
    2.4589622f,    2.50614262f,   2.55525947f,   2.60652137f,   2.66017389f,   2.71650767f,
    2.77587056f,   2.83868575f,   2.90547299f,   2.97688222f,   3.05374193f,   3.13713264f,
    3.22850013f,   3.32984853f,   3.44407177f,   3.57558799f,   3.73166633f,   3.92563772f,
    4.18659544f,   4.60353565f,
};

// Levels ascending; digit c stands for level[c]. A value belongs to digit c when it lies above
// threshold[c - 1] and not above threshold[c]. `distortion` is the mean squared error on N(0, 1),
// rounded up in the last place.
struct Codebook {
  int levels = 0;
  const float* level = nullptr;
  const float* threshold = nullptr;
  double distortion = 0;
};

template <int kLevels>
struct CodebookTable {
  std::array<float, kLevels> level{};
  std::array<float, kLevels - 1> threshold{};

  constexpr explicit CodebookTable(const float (&positive)[(kLevels + 1) / 2]) {
    for (int i = 0; i < (kLevels + 1) / 2; ++i) {
      const float value = positive[(kLevels + 1) / 2 - 1 - i];
      level[static_cast<size_t>(i)] = -value;
      level[static_cast<size_t>(kLevels - 1 - i)] = value;
    }
    for (size_t i = 0; i + 1 < kLevels; ++i) {
      threshold[i] = 0.5F * (level[i] + level[i + 1]);
    }
  }
};

inline constexpr CodebookTable<3> kTable3{kPositiveLevels3};
inline constexpr CodebookTable<4> kTable4{kPositiveLevels4};
inline constexpr CodebookTable<5> kTable5{kPositiveLevels5};
inline constexpr CodebookTable<6> kTable6{kPositiveLevels6};
inline constexpr CodebookTable<8> kTable8{kPositiveLevels8};
inline constexpr CodebookTable<12> kTable12{kPositiveLevels12};
inline constexpr CodebookTable<16> kTable16{kPositiveLevels16};
inline constexpr CodebookTable<32> kTable32{kPositiveLevels32};
inline constexpr CodebookTable<64> kTable64{kPositiveLevels64};
inline constexpr CodebookTable<128> kTable128{kPositiveLevels128};
inline constexpr CodebookTable<256> kTable256{kPositiveLevels256};

template <int kLevels>
constexpr Codebook MakeCodebook(const CodebookTable<kLevels>& table, double distortion) {
  return {kLevels, table.level.data(), table.threshold.data(), distortion};
}

inline constexpr Codebook kLevels3 = MakeCodebook(kTable3, 0.190174039);
inline constexpr Codebook kLevels4 = MakeCodebook(kTable4, 0.117481848);
inline constexpr Codebook kLevels5 = MakeCodebook(kTable5, 0.0799411272);
inline constexpr Codebook kLevels6 = MakeCodebook(kTable6, 0.0579776537);
inline constexpr Codebook kLevels8 = MakeCodebook(kTable8, 0.0345477608);
inline constexpr Codebook kLevels12 = MakeCodebook(kTable12, 0.0163396579);
inline constexpr Codebook kLevels16 = MakeCodebook(kTable16, 0.00950100801);

// Codebooks of 2^b levels, b = 2..8 (index b - 2): the factors'.
inline constexpr std::array<Codebook, 7> kFactorCodebooks = {
    kLevels4,
    kLevels8,
    kLevels16,
    MakeCodebook(kTable32, 0.00250466836),
    MakeCodebook(kTable64, 0.000644239666),
    MakeCodebook(kTable128, 0.000163478230),
    MakeCodebook(kTable256, 4.11850829e-05),
};

inline constexpr int kMinFactorBits = 2;
inline constexpr int kMaxFactorBits = 8;

constexpr const Codebook& FactorCodebook(int bits) {
  return kFactorCodebooks[static_cast<size_t>(bits - kMinFactorBits)];
}

// Digit of the level nearest to x; ties go down.
template <typename T>
KVS_FN int NearestDigit(const Codebook& codebook, T x) {
  int low = 0;
  int high = codebook.levels - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (x > static_cast<T>(codebook.threshold[middle])) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace kvshrink::stages
