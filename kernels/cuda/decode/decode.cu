// Decodes blocks, one CTA each. Four warps share the factors; each decodes 32 rows, 16 at a time:
// digits to integers in a tile, inverse rotation and low-rank part by matrix instructions, straight
// to the target.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/launch.h"
#include "common/unpack.cuh"
#include "decode/decode_args.cuh"
#include "decode/generic_rows.cuh"
#include "decode/hadamard_tiles.cuh"
#include "decode/low_rank_tiles.cuh"

namespace kvshrink::cuda {
namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarpRows = 32;
constexpr uint32_t kTileRows = 16;

template <int kDim>
constexpr size_t kWarpHalfs = kTernaryHalfs<kDim, kWarpRows>;
static_assert(kWarpHalfs<64> % 8 == 0 && kWarpHalfs<128> % 8 == 0 && kWarpHalfs<256> % 8 == 0);
template <int kDim>
constexpr size_t kSharedBytes = (kThreads / 32 * kWarpHalfs<kDim> +
                                 kFactorHalfs<kDim>)*sizeof(__half);
static_assert(GenericFloats(64) * 4 <= kSharedBytes<64> &&
              GenericFloats(256) * 4 <= kSharedBytes<256>);

// What the 32 rows of a warp need besides their digits, a row a lane.
template <typename Value>
struct WarpRow {
  float scale = 0;      // of the sums
  Value* to = nullptr;  // null: not written
};

template <int kDim, typename Out>
__device__ WarpRow<typename Out::Value> FindRow(const DecodeArgs& args, const Work& work,
                                                const StoredScale& stored, uint32_t row,
                                                uint32_t* errors) {
  const BlockDesc& block = work.block;
  WarpRow<typename Out::Value> result;
  if (row >= block.coded_rows()) {
    return result;
  }
  if (args.form == DecodeForm::kFull) {
    bool bad = false;
    result.scale = DecodeScale(block, stored, kDim, row, &bad) *
                   kAlphabetTable.of[block.code - kFirstAlphabet].unit *
                   rsqrtf(static_cast<float>(kDim));
    *errors |= bad ? kScaleError : 0;
  }
  if (work.Wanted(args, block.raw_rows + row)) {
    result.to = work.Row<typename Out::Value>(args, block.raw_rows + row);
  }
  return result;
}

// Asks for the block of a CTA that will start when this one ends.
__device__ void PrefetchLater(const DecodeArgs& args, uint32_t lane) {
  constexpr uint32_t kAhead = 528;  // four CTAs on each of 132 multiprocessors
  const uint32_t plane = gridDim.x * gridDim.y;
  const uint32_t number = blockIdx.x + gridDim.x * blockIdx.y + kAhead;
  const uint32_t shard = blockIdx.z + number / plane;
  if (shard < gridDim.z) {
    const uint32_t row = number % plane / gridDim.x;
    const BlockDesc& block = args.view.blocks[args.view.Place(
        shard, args.first_kind + row / args.heads, args.head_begin + row % args.heads,
        args.token_begin / kBlockTokens + number % gridDim.x)];
    PrefetchBlock(block, args.head_dim, lane);
  }
}

// Token factors of the 16 rows from coded row `first` on. kHalves: of eight components each.
template <int kDim, int kHalves>
__device__ void LoadTokens(const FactorTiles<kDim>& factors, const BlockDesc& block, uint32_t first,
                           uint32_t lane, uint32_t (&tokens)[2][4]) {
  const uint32_t row = min(block.raw_rows + first + lane % 16, kBlockTokens - 1);
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const auto half = static_cast<uint32_t>(h);
    LoadTiles(tokens[h], factors.Token(half, lane / 16, row));
  }
}

// Adds the low-rank part of one group of 16 channels.
template <int kDim, int kHalves>
__device__ inline void AddLowRank(const FactorTiles<kDim>& factors, uint32_t j, uint32_t lane,
                                  const uint32_t (&tokens)[2][4], float (&sums)[2][4]) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const auto half = static_cast<uint32_t>(h);
    uint32_t channel[4];  // tile 0 high, tile 1 high, both low
    LoadTiles(channel, factors.Channel(half, lane / 16, 16 * j + lane % 16));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      Mma8(sums[tile], tokens[half][0], tokens[half][1], channel[2 + tile]);
      Mma8(sums[tile], tokens[half][2], tokens[half][3], channel[tile]);
      Mma8(sums[tile], tokens[half][0], tokens[half][1], channel[tile]);
    }
  }
}

template <typename Out>
__device__ inline void FinishGroup(float up, uint32_t channel, const float (&sums)[2][4],
                                   typename Out::Value* const (&to)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float x[4] = {sums[0][2 * i] * up, sums[0][2 * i + 1] * up, sums[1][2 * i] * up,
                  sums[1][2 * i + 1] * up};
    if constexpr (Out::kDType == Fp16Out::kDType) {
#pragma unroll
      for (float& value : x) {
        value = Clamp(value, Out::kLargest);
      }
    }
    StoreIf<Out>(to[i] != nullptr, to[i] + channel, x);
  }
}

// 16 rows from coded row `first` on. kParts: tiles of integers (coarse, fine) to be added; 0: the
// low-rank part alone. kHalves: of the components.
template <int kDim, int kParts, int kHalves, typename Out>
__device__ void DecodeTile(const BlockDesc& block, const FactorTiles<kDim>& factors, uint32_t first,
                           const WarpRow<typename Out::Value>& rows, const __half* coarse,
                           const __half* fine, uint32_t lane) {
  float scale[2];
  typename Out::Value* to[2];
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const int from = static_cast<int>(first % kWarpRows + lane / 4 + 8 * i);
    scale[i] = __shfl_sync(kAllLanes, rows.scale, from);
    to[i] = reinterpret_cast<typename Out::Value*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(rows.to), from));
  }
  float up = PowerOfTwo(block.exponent);
  if constexpr (kHalves == 0) {
    scale[0] *= up;
    scale[1] *= up;
    up = 1;
  }
  uint32_t a[kParts == 0 ? 1 : kParts][kDim / 16][4];
  if constexpr (kParts > 0) {
    LoadTransformed<kDim, kTileStride<kDim>>(coarse, lane, a[0]);
  }
  if constexpr (kParts > 1) {
    LoadTransformed<kDim, kTileStride<kDim>>(fine, lane, a[1]);
  }
  uint32_t tokens[2][4];
  LoadTokens<kDim, kHalves>(factors, block, first, lane, tokens);
#pragma unroll
  for (uint32_t j = 0; j < kDim / 16; ++j) {
    float sums[2][4] = {};
    if constexpr (kParts > 0) {
      if (kParts == 1 && j == 0) {
        // Ternary digits stand for themselves less one: the transform of ones is kDim at channel 0.
        const float sign = (SignBits(stages::kRowSeed, 0) & 1U) != 0 ? 1.0F : -1.0F;
        sums[0][0] = lane % 4 == 0 ? sign * kDim * 0x1p-24F : 0;
        sums[0][2] = sums[0][0];
      }
      const uint4 b = __ldg(&kHadamard<kDim>.lane[j][lane]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Mma16(sums[0], a[part][j], b.x, b.y);
        Mma16(sums[1], a[part][j], b.z, b.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[0][i] *= scale[i / 2];
        sums[1][i] *= scale[i / 2];
      }
    }
    AddLowRank<kDim, kHalves>(factors, j, lane, tokens, sums);
    if constexpr (kHalves == 0) {
      FinishGroup<Out>(1.0F, 16 * j + lane % 4 * 4, sums, to);
    } else {
      FinishGroup<Out>(up, 16 * j + lane % 4 * 4, sums, to);
    }
  }
}

template <int kDim, typename Out>
__device__ uint32_t DecodeLevels(const DecodeArgs& args, const Work& work, __half* shared) {
  const BlockDesc& block = work.block;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  __half* tile = shared + warp * kWarpHalfs<kDim> + kRoomBefore;
  __half* second = tile + kTileRows * kTileStride<kDim>;
  const FactorTiles<kDim> factors{shared + kThreads / 32 * kWarpHalfs<kDim>};
  uint32_t errors = 0;
  const uint32_t first = warp * kWarpRows;
  const uint32_t count = min(kWarpRows, block.coded_rows() - min(block.coded_rows(), first));
  const bool full = args.form == DecodeForm::kFull;
  const bool ternary = full && block.code == static_cast<uint8_t>(BlockCode::kLevels3);
  // What comes from memory is asked for before anything waits.
  uint32_t words[kTernarySteps<kDim, kWarpRows>];
  if (ternary) {
    LoadTernary<kDim, kWarpRows>(block, first, count, lane, words);
  }
  const StoredScale stored =
      full && lane < count ? StoredScale(block, first + lane) : StoredScale();
  const LowPart low(block, kDim);
  const uint32_t own_pair = LanePlaces::LoadPair(low.record, block.rank, lane);
  if (warp == 0 && full) {
    PrefetchLater(args, lane);
  }
  const auto rows = FindRow<kDim, Out>(args, work, stored, first + lane, &errors);
  if (block.rank > 0 || !full) {
    const uint32_t halves = ternary && block.rank <= 8 ? 1 : 2;
    DecodeFactors(block, factors, halves, low, own_pair, reinterpret_cast<float*>(tile));
  }
  if (ternary && UnpackTernaryWords<kDim, kWarpRows>(words, first, tile, lane)) {
    errors |= kCodesError;
  }
  const AlphabetLane alphabet = LoadAlphabet(full ? block.code : 0, lane);
  for (uint32_t row = 0; row < count; row += kTileRows) {
    __syncwarp();
    if (ternary) {
      const __half* mine = row == 0 ? tile : second;
      if (block.rank == 0) {
        DecodeTile<kDim, 1, 0, Out>(block, factors, first + row, rows, mine, nullptr, lane);
      } else if (block.rank <= 8) {
        DecodeTile<kDim, 1, 1, Out>(block, factors, first + row, rows, mine, nullptr, lane);
      } else {
        DecodeTile<kDim, 1, 2, Out>(block, factors, first + row, rows, mine, nullptr, lane);
      }
    } else if (full) {
      if (UnpackOtherRows<kDim>(block, alphabet, first + row, min(kTileRows, count - row), tile,
                                second, lane)) {
        errors |= kCodesError;
      }
      __syncwarp();
      if (block.rank == 0) {
        DecodeTile<kDim, 2, 0, Out>(block, factors, first + row, rows, tile, second, lane);
      } else {
        DecodeTile<kDim, 2, 2, Out>(block, factors, first + row, rows, tile, second, lane);
      }
    } else {
      DecodeTile<kDim, 0, 2, Out>(block, factors, first + row, rows, nullptr, nullptr, lane);
    }
  }
  return errors;
}

// Whether all rows lie at multiples of four elements.
template <typename Out>
__device__ bool Aligned(const DecodeArgs& args, const Work& work) {
  const auto base = reinterpret_cast<uintptr_t>(work.kind == 0 ? work.target.k : work.target.v);
  return base % (4 * sizeof(typename Out::Value)) == 0 &&
         (args.layout.page_stride | args.layout.token_stride | args.layout.head_stride) % 4 == 0;
}

// Any block, 16 rows at a time.
template <typename Out>
__device__ uint32_t DecodeGeneric(const DecodeArgs& args, const Work& work, float* shared) {
  const uint32_t d = args.head_dim;
  const uint32_t m = work.block.coded_rows();
  uint32_t errors = 0;
  for (uint32_t first = 0; first < m; first += kGenericRows) {
    const uint32_t count = min(kGenericRows, m - first);
    errors |= GenericDecodeRows(work.block, d, args.form, first, count, shared);
    for (uint32_t i = threadIdx.x; i < count * d; i += kThreads) {
      const uint32_t row = work.block.raw_rows + first + i / d;
      if (work.Wanted(args, row)) {
        work.Row<typename Out::Value>(args, row)[i % d] = Out::Round(shared[i]);
      }
    }
  }
  return errors;
}

// kDim 0: any.
template <int kDim, typename Out>
__global__ void __launch_bounds__(kThreads, kDim == 256 ? 2 : 4) DecodeKernel(DecodeArgs args) {
  extern __shared__ uint4 shared[];
  Work work;
  if (!FindWork(args, &work)) {
    return;
  }
  const BlockDesc& block = work.block;
  CopyRows<Out>(args, work, block.low, 0, block.raw_rows);
  uint32_t errors = 0;
  const bool full = args.form == DecodeForm::kFull;
  if (block.has_levels()) {
    // Of a large exponent values may have to be clamped, which fp16 always does.
    const bool tuned = kDim > 0 && block.rank <= kTileRank && Aligned<Out>(args, work) &&
                       (block.exponent <= 100 || Out::kDType == Fp16Out::kDType) &&
                       block.family() != static_cast<uint32_t>(Family::kEOptShrinkQ);
    if (tuned) {
      errors = DecodeLevels < kDim == 0 ? 64 : kDim,
      Out > (args, work, reinterpret_cast<__half*>(shared));
    } else {
      errors = DecodeGeneric<Out>(args, work, reinterpret_cast<float*>(shared));
    }
  } else if (block.code == static_cast<uint8_t>(BlockCode::kRaw) && full) {
    CopyRows<Out>(args, work, block.codes, block.raw_rows, block.coded_rows());
  } else if (block.code == static_cast<uint8_t>(BlockCode::kFp8) && full) {
    errors = DecodeGeneric<Out>(args, work, reinterpret_cast<float*>(shared));
  } else {
    ZeroRows<Out>(args, work, block.raw_rows, block.coded_rows());
  }
  ReportErrors(args, work, errors);
}

template <int kDim, typename Out>
int Launch(const DecodeArgs& args, dim3 grid, cudaStream_t stream) {
  const size_t bytes = kDim == 0                  ? GenericFloats(args.head_dim) * sizeof(float)
                       : kSharedBytes < kDim == 0 ? 64
                                                  : kDim > ;
  const cudaError_t result =
      cudaFuncSetAttribute(DecodeKernel<kDim, Out>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(bytes));
  if (result != cudaSuccess) {
    return result;
  }
  DecodeKernel<kDim, Out><<<grid, kThreads, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <typename Out>
int LaunchFor(const DecodeArgs& args, dim3 grid, cudaStream_t stream) {
  switch (args.head_dim) {
    case 64:
      return Launch<64, Out>(args, grid, stream);
    case 128:
      return Launch<128, Out>(args, grid, stream);
    case 256:
      return Launch<256, Out>(args, grid, stream);
    default:
      return Launch<0, Out>(args, grid, stream);
  }
}

bool ValidDecode(const DecodeParams& params) {
  const ShardBatch& batch = params.batch;
  const uint64_t stride =
      std::max({params.layout.page_stride, params.layout.token_stride, params.layout.head_stride});
  return ValidBatch(batch) && params.view != nullptr && params.targets != nullptr &&
         params.status != nullptr && params.head_begin < params.head_end &&
         params.head_end <= batch.kv_heads && params.token_begin < params.token_end &&
         params.token_end <= batch.max_tokens && (params.keys || params.values) &&
         stride <= uint64_t{1} << 40 && params.dtype != DType::kFp8E4m3;
}

}  // namespace

int ApiDecode(const DecodeParams& params, void* stream) {
  if (!ValidDecode(params)) {
    return kBadArgument;
  }
  DecodeArgs args;
  args.view = ViewOf(params.batch, const_cast<void*>(params.view));
  args.targets = params.targets;
  args.layout = params.layout;
  args.status = params.status;
  args.head_dim = params.batch.head_dim;
  args.head_begin = params.head_begin;
  args.heads = params.head_end - params.head_begin;
  args.token_begin = params.token_begin;
  args.token_end = params.token_end;
  args.first_kind = params.keys ? 0 : 1;
  args.form = params.form;
  const uint32_t kinds = params.keys && params.values ? 2 : 1;
  const uint32_t first_block = params.token_begin / kBlockTokens;
  const uint32_t blocks = (params.token_end + kBlockTokens - 1) / kBlockTokens - first_block;
  const dim3 grid(blocks, kinds * args.heads, params.batch.shards);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::kFp32:
      return LaunchFor<Fp32Out>(args, grid, queue);
    case DType::kFp16:
      return LaunchFor<Fp16Out>(args, grid, queue);
    default:
      return LaunchFor<Bf16Out>(args, grid, queue);
  }
}

}  // namespace kvshrink::cuda
