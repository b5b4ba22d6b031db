// Decoding on the GPU against the CPU backend: every profile, shape, layout and range.
#include <algorithm>
#include <cmath>
#include <random>

#include "device.h"
#include "format/layout.h"
#include "stages/minifloat.h"

namespace kvshrink {
namespace {

using cuda::CudaTarget;
using testing::Buffer;
using testing::DeviceBatch;
using testing::Tensor;

class GpuDecode : public testing::GpuTest {};

float LargestOf(const std::vector<float>& values) {
  float largest = 0;
  for (const float value : values) {
    largest = std::isfinite(value) ? std::max(largest, std::fabs(value)) : largest;
  }
  return largest;
}

// Two decoders agree within 2^-16 sqrt(d) 2^e, and 2^e is at most twice the largest magnitude that
// was encoded; levels of the integer form add 2^-16 of that.
float ToleranceOf(const Tensor& source) {
  return std::ldexp(std::sqrt(static_cast<float>(source.shape.head_dim)) + 1, -15) *
         LargestOf(source.values);
}

struct Case {
  std::string name;
  Tensor k, v;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  uint32_t seed = 1;
  for (const TensorShape& shape :
       {TensorShape{128, 2, 128}, TensorShape{300, 3, 128}, TensorShape{129, 2, 64},
        TensorShape{37, 1, 64}, TensorShape{256, 2, 256}, TensorShape{140, 1, 256},
        TensorShape{200, 2, 96}, TensorShape{131, 1, 80}, TensorShape{64, 3, 16},
        TensorShape{2, 1, 5}, TensorShape{1, 1, 128}, TensorShape{130, 1, 512}}) {
    const std::string name = std::to_string(shape.tokens) + "x" + std::to_string(shape.kv_heads) +
                             "x" + std::to_string(shape.head_dim);
    cases.push_back({"low rank " + name, testing::LowRankPlusNoise(shape, 6, 0.2F, seed),
                     testing::Gaussian(shape, seed + 1, 3)});
    seed += 2;
  }
  cases.push_back({"smollm2", testing::SmolLayer("k", 12), testing::SmolLayer("v", 12)});
  cases.push_back({"qwen", testing::QwenLayer("k", 4), testing::QwenLayer("v", 4)});
  cases.push_back({"huge", testing::Gaussian({130, 1, 64}, 77, 1e37F),
                   testing::Gaussian({130, 1, 64}, 78, 1e-36F)});
  Case odd{"zeros and what isn't finite", testing::Gaussian({260, 1, 128}, 79),
           testing::Zeros({260, 1, 128})};
  odd.k.at(200, 0, 3) = std::numeric_limits<float>::quiet_NaN();
  cases.push_back(odd);
  return cases;
}

constexpr Profile kProfiles[] = {Profile::kRaw,  Profile::kFp8,  Profile::kTq2,
                                 Profile::kTq3,  Profile::kTq4,  Profile::kEOptShrinkQ2,
                                 Profile::kKvs2, Profile::kKvs3, Profile::kKvs4};

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, float tolerance,
                const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  size_t wrong = 0;
  size_t first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const bool same =
        std::isnan(want[i]) ? std::isnan(got[i]) : std::fabs(got[i] - want[i]) <= tolerance;
    first = !same && wrong == 0 ? i : first;
    wrong += same ? 0 : 1;
  }
  EXPECT_EQ(wrong, 0U) << what << ": of " << got.size() << ", first at " << first << ": "
                       << got[first] << " for " << want[first] << ", tolerance " << tolerance;
}

TEST_F(GpuDecode, AgreesWithTheCpu) {
  const auto backend = MakeCpuBackend();
  for (const Case& test : Cases()) {
    for (const Profile profile : kProfiles) {
      for (const DecodeForm form : {DecodeForm::kFull, DecodeForm::kLowRank}) {
        EncodeOptions options = testing::OptionsOf(profile);
        options.raw_tokens = 3;
        const std::string bytes = *EncodeShard(*backend, test.k.View(), test.v.View(), options);
        const auto want = *testing::DecodeAll(*backend, bytes, form);
        const TensorShape shape = test.k.shape;
        DeviceBatch batch(*api_, {bytes}, shape);
        ExpectOk(batch.Parse());
        Buffer<float> k(shape.entries());
        Buffer<float> v(shape.entries());
        const Buffer<CudaTarget> targets({CudaTarget{k.get(), v.get(), nullptr, 0, 0}});
        ExpectOk(api_->decode(
            DecodeAllParams(batch, DType::kFp32, LayoutThd(shape), targets.get(), form), nullptr));
        const auto name = test.name + ", " + std::string(GetProfileInfo(profile).name) +
                          (form == DecodeForm::kFull ? "" : ", low rank");
        ExpectNear(k.Get(), want.k.values, ToleranceOf(test.k), name + ", K");
        ExpectNear(v.Get(), want.v.values, ToleranceOf(test.v), name + ", V");
        EXPECT_EQ(batch.Status()[0], 0U) << name;
      }
    }
  }
}

TEST_F(GpuDecode, SmallEveryAlphabet) {
  // A bound on the error makes blocks climb from alphabet to alphabet.
  const auto backend = MakeCpuBackend();
  const TensorShape shape{150, 2, 128};
  const Tensor k = testing::Gaussian(shape, 5);
  for (const float bound : {0.12F, 0.085F, 0.06F, 0.035F, 0.017F, 0.0096F, 0.001F}) {
    EncodeOptions options = testing::OptionsOf(Profile::kKvs2);
    options.max_relative_error = bound;
    const std::string bytes = *EncodeShard(*backend, k.View(), k.View(), options);
    const auto want = *testing::DecodeAll(*backend, bytes);
    DeviceBatch batch(*api_, {bytes}, shape);
    ExpectOk(batch.Parse());
    Buffer<float> got(shape.entries());
    Buffer<float> values(shape.entries());
    const Buffer<CudaTarget> targets({CudaTarget{got.get(), values.get(), nullptr, 0, 0}});
    ExpectOk(api_->decode(DecodeAllParams(batch, DType::kFp32, LayoutThd(shape), targets.get()),
                          nullptr));
    ExpectNear(got.Get(), want.k.values, ToleranceOf(k), "bound " + std::to_string(bound));
    ExpectNear(values.Get(), want.v.values, ToleranceOf(k), "bound " + std::to_string(bound));
    EXPECT_EQ(batch.Status()[0], 0U);
  }
}

// A batch of three shards into one paged cache, bf16 and fp16: what is asked for, and nothing else.
TEST_F(GpuDecode, SmallPagedRangesLeaveTheRestAlone) {
  const auto backend = MakeCpuBackend();
  const TensorShape shape{192, 4, 128};
  std::vector<std::string> shards;
  std::vector<testing::Decoded> want;
  for (uint32_t i = 0; i < 3; ++i) {
    const Tensor k = testing::LowRankPlusNoise(shape, 4, 0.2F, 10 + i);
    const Tensor v = testing::Gaussian(shape, 20 + i);
    shards.push_back(
        *EncodeShard(*backend, k.View(), v.View(), testing::OptionsOf(Profile::kKvs2)));
    want.push_back(*testing::DecodeAll(*backend, shards.back()));
  }
  constexpr uint32_t kPage = 16;
  constexpr uint32_t kPages = 40;
  const TensorLayout layout = LayoutBnhd({kPage * kPages, 4, 128}, kPage);
  std::vector<int32_t> table(kPages);
  for (int i = 0; i < static_cast<int>(kPages); ++i) {
    table[static_cast<size_t>(i)] = (i * 7 + 3) % static_cast<int>(kPages);
  }
  const Buffer<int32_t> device_table(table);
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    DeviceBatch batch(*api_, shards, shape);
    ExpectOk(batch.Parse());
    Buffer<uint16_t> cache_k(size_t{kPages} * kPage * 4 * 128);
    Buffer<uint16_t> cache_v(size_t{kPages} * kPage * 4 * 128);
    std::vector<CudaTarget> targets;
    for (uint32_t i = 0; i < 3; ++i) {
      targets.push_back({cache_k.get(), cache_v.get(), device_table.get(), i * shape.tokens, 0});
    }
    const Buffer<CudaTarget> device_targets(targets);
    cuda::DecodeParams params = DecodeAllParams(batch, dtype, layout, device_targets.get());
    params.head_begin = 1;
    params.head_end = 3;
    params.token_begin = 50;
    params.token_end = 150;
    params.values = false;
    ExpectOk(api_->decode(params, nullptr));
    const std::vector<uint16_t> k = cache_k.Get();
    size_t wrong = 0;
    for (uint32_t token = 0; token < kPage * kPages; ++token) {
      const uint32_t shard = token / shape.tokens;
      const uint32_t own = token % shape.tokens;
      for (uint32_t head = 0; head < 4; ++head) {
        const size_t row =
            (static_cast<size_t>(table[token / kPage]) * kPage + token % kPage) * 4 + head;
        const bool wanted = shard < 3 && own >= 50 && own < 150 && head >= 1 && head < 3;
        for (uint32_t c = 0; c < 128; ++c) {
          const uint16_t got = k[row * 128 + c];
          if (!wanted) {
            wrong += got == 0xA5A5 ? 0 : 1;
            continue;
          }
          const float value = want[shard].k.at(own, head, c);
          const float read =
              dtype == DType::kBf16 ? stages::Bf16ToFloat(got) : stages::Fp16ToFloat(got);
          wrong += std::fabs(read - value) <= std::fabs(value) * 0.004F + 1e-3F ? 0 : 1;
        }
      }
    }
    EXPECT_EQ(wrong, 0U);
    const std::vector<uint16_t> v = cache_v.Get();
    EXPECT_TRUE(std::all_of(v.begin(), v.end(), [](uint16_t x) { return x == 0xA5A5; }));
  }
}

TEST_F(GpuDecode, SmallOddStridesAndBitExactRawRows) {
  const auto backend = MakeCpuBackend();
  const TensorShape shape{70, 2, 64};
  const Tensor source = testing::Gaussian(shape, 3);
  std::vector<uint16_t> halves;
  for (const float value : source.values) {
    halves.push_back(stages::FloatToFp16(value));
  }
  const ConstTensor tensor{reinterpret_cast<const std::byte*>(halves.data()), DType::kFp16, shape,
                           LayoutThd(shape)};
  EncodeOptions options = testing::OptionsOf(Profile::kKvs3);
  options.raw_tokens = 20;
  const std::string bytes = *EncodeShard(*backend, tensor, tensor, options);
  DeviceBatch batch(*api_, {bytes}, shape);
  ExpectOk(batch.Parse());
  const TensorLayout layout{0, 0, 151, 73};  // of no alignment
  Buffer<uint16_t> k(size_t{70} * 151 + 73);
  Buffer<uint16_t> v(size_t{70} * 151 + 73);
  const Buffer<CudaTarget> targets({CudaTarget{k.get() + 1, v.get() + 1, nullptr, 0, 0}});
  ExpectOk(api_->decode(DecodeAllParams(batch, DType::kFp16, layout, targets.get()), nullptr));
  const auto want = *testing::DecodeAll(*backend, bytes);
  const std::vector<uint16_t> got = k.Get();
  for (uint32_t token = 0; token < 70; ++token) {
    for (uint32_t head = 0; head < 2; ++head) {
      for (uint32_t c = 0; c < 64; ++c) {
        const size_t from = (size_t{token} * 2 + head) * 64 + c;
        const uint16_t value = got[1 + layout.Offset(token, head) + c];
        if (token < 20) {
          ASSERT_EQ(value, halves[from]);
        } else {
          ASSERT_NEAR(stages::Fp16ToFloat(value), want.k.values[from], 0.003);
        }
      }
    }
  }
  EXPECT_EQ(got[0], 0xA5A5);
}

TEST_F(GpuDecode, PreviewAndHostileBytes) {
  const auto backend = MakeCpuBackend();
  const TensorShape shape{140, 2, 128};
  const Tensor k = testing::LowRankPlusNoise(shape, 3, 0.1F, 1);
  const std::string bytes =
      *EncodeShard(*backend, k.View(), k.View(), testing::OptionsOf(Profile::kKvs2));
  const std::string preview = bytes.substr(0, Shard::Parse(bytes)->preview_bytes());
  const auto want = *testing::DecodeAll(*backend, preview, DecodeForm::kLowRank);
  DeviceBatch batch(*api_, {preview}, shape);
  ExpectOk(batch.Parse());
  Buffer<float> got(shape.entries());
  Buffer<float> values(shape.entries());
  const Buffer<CudaTarget> targets({CudaTarget{got.get(), values.get(), nullptr, 0, 0}});
  const auto layout = LayoutThd(shape);
  ExpectOk(api_->decode(
      DecodeAllParams(batch, DType::kFp32, layout, targets.get(), DecodeForm::kLowRank), nullptr));
  ExpectNear(got.Get(), want.k.values, ToleranceOf(k), "preview, K");
  ExpectNear(values.Get(), want.v.values, ToleranceOf(k), "preview, V");
  EXPECT_EQ(batch.Status()[0], 0U);
  ExpectOk(api_->decode(DecodeAllParams(batch, DType::kFp32, layout, targets.get()), nullptr));
  EXPECT_EQ(batch.Status()[0] >> 32, static_cast<uint64_t>(cuda::ShardField::kSize));

  // One byte of header or index changed, with or without its checksum made right: the parse finds
  // what the CPU's finds.
  std::mt19937 random(7);
  std::vector<std::string> damaged;
  std::vector<bool> good;
  const size_t index_end = Shard::Parse(bytes)->shared_bytes();
  for (int i = 0; i < 600; ++i) {
    std::string bad = bytes;
    auto* data = reinterpret_cast<uint8_t*>(bad.data());
    const size_t place = i % 2 == 0 ? random() % 96 : 96 + random() % (index_end - 96);
    data[place] = static_cast<uint8_t>(random());
    if (i % 3 != 0) {
      format::StoreLittle(format::SectionChecksum(data + 96, index_end - 96),
                          data + format::offset::kIndexChecksum);
      format::StoreLittle(format::HeaderChecksum(data, 88), data + 88);
    }
    const auto shard = Shard::Parse(bad, Extent::kAllowPreview);
    // A changed section checksum is the one thing that the device doesn't look at.
    const bool section = place >= 64 && place < 88;
    if (section) {
      continue;
    }
    damaged.push_back(bad);
    good.push_back(shard.ok() && shard->header().shape == shape);
  }
  DeviceBatch many(*api_, damaged, shape);
  ExpectOk(many.Parse());
  const std::vector<uint64_t> status = many.Status();
  for (size_t i = 0; i < good.size(); ++i) {
    EXPECT_EQ(status[i] == 0, good[i]) << i << ": field " << (status[i] >> 32);
  }
  const std::vector<CudaTarget> same(damaged.size(),
                                     CudaTarget{got.get(), values.get(), nullptr, 0, 0});
  const Buffer<CudaTarget> many_targets(same);
  ExpectOk(api_->decode(DecodeAllParams(many, DType::kFp32, layout, many_targets.get()), nullptr));
  testing::Check(cudaDeviceSynchronize());
}

TEST_F(GpuDecode, SmallGroupsOutOfRangeAreTold) {
  const auto backend = MakeCpuBackend();
  const TensorShape shape{128, 1, 128};
  const Tensor k = testing::Gaussian(shape, 1);
  for (const Profile profile : {Profile::kKvs2, Profile::kKvs3}) {
    std::string bytes = *EncodeShard(*backend, k.View(), k.View(), testing::OptionsOf(profile));
    const size_t codes = bytes.size() - 2000;
    std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(codes),
              bytes.begin() + static_cast<std::ptrdiff_t>(codes + 16), '\xFF');
    DeviceBatch batch(*api_, {bytes}, shape);
    ExpectOk(batch.Parse());
    EXPECT_EQ(batch.Status()[0], 0U);
    Buffer<float> got(shape.entries());
    Buffer<float> values(shape.entries());
    const Buffer<CudaTarget> targets({CudaTarget{got.get(), values.get(), nullptr, 0, 0}});
    ExpectOk(api_->decode(DecodeAllParams(batch, DType::kFp32, LayoutThd(shape), targets.get()),
                          nullptr));
    EXPECT_EQ(batch.Status()[0] >> 32, static_cast<uint64_t>(cuda::ShardField::kCodes));
  }
}

}  // namespace
}  // namespace kvshrink
