// One CTA codes one block: from global memory to its slot.
#pragma once

#include "cuda/encode/code_rows.cuh"
#include "cuda/encode/pack.cuh"

namespace kvshrink::cuda {

// Shared memory of a CTA.
template <int kDim>
struct SharedLayout {
  static constexpr uint32_t kFactorFloats =
      kFactorCap * (kDim + 4 > kFactorStride ? kDim + 4 : kFactorStride);
  static constexpr uint32_t kBlock = 0;                                   // X, then its digits
  static constexpr uint32_t kFactors = kBlock + kBlockTokens * kDim * 2;  // rows of factors;
                                                                          // before: token panel
  static constexpr uint32_t kChannels = kFactors + kFactorFloats * 4;     // channel panel
  static constexpr uint32_t kResidual = kChannels + kDim * 32;            // panel of the residual
  static constexpr uint32_t kSmall = kResidual + kDim * 64;               // 16 x 16
  static constexpr uint32_t kRecord = kSmall + 1024;                      // factor record
  static constexpr uint32_t kRecordWords = (24 + kFactorCap * (kDim + kBlockTokens)) / 4 + 2;
  static constexpr uint32_t kRowValues = kRecord + kRecordWords * 4;  // energies, then scales
  static constexpr uint32_t kOffsets = kRowValues + kBlockTokens * 4;
  static constexpr uint32_t kScratch = kOffsets + kBlockTokens;  // 32 floats
  static constexpr uint32_t kPlan = kScratch + 128;
  static constexpr uint32_t kBytes = kPlan + sizeof(FactorPlan) + 8;
  // While the subspace is sought the panel of the residual is free.
  static constexpr uint32_t kSquares = kResidual;
  static constexpr uint32_t kLambda = kResidual + 1024;
  // The low-rank stages leave out all of this.
  static constexpr uint32_t kPlainBytes = kBlockTokens * kDim * 2 + 128 + kBlockTokens * 4;
};

// Rank, factors, record and the residual's panel. All threads; `x` is in place.
template <int kDim>
__device__ __forceinline__ void CodeFactors(uint8_t* shared, const BlockPlace& place, float energy,
                                            float price, int cap, int thread) {
  using Shape = BlockShape<kDim>;
  using At = SharedLayout<kDim>;
  const int lane = thread & 31;
  const int warp = thread >> 5;
  const uint32_t x = SharedAddress(shared + At::kBlock);
  auto* factors = reinterpret_cast<float*>(shared + At::kFactors);
  auto* w = reinterpret_cast<float*>(shared + At::kSmall);
  auto* words = reinterpret_cast<uint32_t*>(shared + At::kRecord);
  auto* plan = reinterpret_cast<FactorPlan*>(shared + At::kPlan);
  const SubspaceScratch scratch = {shared + At::kFactors, shared + At::kChannels, w,
                                   reinterpret_cast<float*>(shared + At::kLambda),
                                   reinterpret_cast<float*>(shared + At::kSquares)};
  for (uint32_t i = static_cast<uint32_t>(thread); i < At::kRecordWords; i += Shape::kThreads) {
    words[i] = 0;
  }
  FindSubspace<kDim>(x, energy, scratch, thread);
  if (warp == 0) {
    ChooseFactors(scratch.lambda, place.rows, kDim, price, cap, lane, plan);
  }
  __syncthreads();
  const int rank = plan->rank;
  if (rank == 0) {
    return;
  }
  constexpr int kStride = kDim + 4;
  StoreChannelVectors<kDim>(scratch, rank, factors, kStride, thread);
  __syncthreads();
  for (int i = warp; i < rank; i += Shape::kWarps) {
    CodeChannelVector<kDim>(factors + i * kStride, i, *plan, words, lane);
  }
  __syncthreads();
  StorePanels<kDim>(factors, kStride, rank, shared + At::kChannels, shared + At::kResidual, thread);
  __syncthreads();
  const uint32_t channels = SharedAddress(shared + At::kChannels);
  if (warp == 0) {
    GramOfPanel<kDim>(channels, lane, w);
    InvertCholesky<Scaling::kOrthonormal>(w, lane, 1e-6F, 1e-30F);
  }
  constexpr int kTiles = Shape::kTokensPerWarp / 16;
  const int first_token = warp * Shape::kTokensPerWarp;
  float y[kTiles][2][4];
  MultiplyRows<kDim, kTiles>(x, channels, first_token, lane, y);
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int component = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
      const int token = first_token + 16 * m + 8 * ((i >> 1) & 1) + (lane >> 2);
      if (component < rank) {
        factors[component * kFactorStride + token] = y[m][i >> 2][i & 3];
      }
    }
  }
  __syncthreads();
  if (lane < Shape::kTokensPerWarp) {
    SolveToken(w, rank, factors, first_token + lane);
  }
  __syncthreads();
  for (int i = warp; i < static_cast<int>(kFactorCap); i += Shape::kWarps) {
    CodeTokenVector(factors, i, place.rows, plan, words, lane);
  }
  __syncthreads();
  if (thread < rank) {
    PutBits(words, static_cast<uint32_t>(16 * thread),
            static_cast<uint64_t>(plan->token_bits[thread]) |
                static_cast<uint64_t>(plan->channel_bits[thread]) << 4 |
                static_cast<uint64_t>(plan->scale[thread]) << 8,
            16);
  }
}

// Scales of the rows from their squares in `values`, `unit` times whose root is the wanted scale;
// replaces those of the warp's own rows by the scales that a decoder
// gets. Every warp finds the block's scale for itself. Returns the record's first two
// bytes; adds to `error` the rows whose scale became zero.
template <int kDim>
__device__ __forceinline__ uint32_t ChooseScales(float* values, uint8_t* offsets, int rows,
                                                 int raw_rows, float unit, int warp, int lane,
                                                 float* error) {
  using Shape = BlockShape<kDim>;
  float largest = 0;
  float smallest = 3.0e38F;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kBlockTokens) / 32; ++i) {
    const int row = lane + 32 * i;
    const bool coded = row >= raw_rows && row < rows;
    const float energy = coded ? values[row] : 0.0F;
    largest = fmaxf(largest, energy);
    smallest = energy > 0 ? fminf(smallest, energy) : smallest;
  }
  largest = sqrtf(WarpMax(largest)) * unit;
  smallest = WarpMin(smallest);
  smallest = smallest < 3.0e38F ? sqrtf(smallest) * unit : 0.0F;
  const uint8_t q = stages::EncodeScale8(largest);
  const auto top = stages::DecodeScale8<float>(q);
  const int step = stages::OffsetStep(top, smallest);
  __syncthreads();  // all warps have read the energies
  const int row = warp * Shape::kTokensPerWarp + lane;
  if (lane < Shape::kTokensPerWarp && row >= raw_rows && row < rows) {
    const float wanted = sqrtf(values[row]) * unit;
    const uint8_t offset = stages::EncodeOffset(wanted, top, step);
    offsets[row] = offset;
    *error += offset == stages::kZeroOffset ? wanted * wanted * kDim : 0.0F;
    values[row] = top * stages::DecodeOffset<float>(offset, step);
  }
  __syncwarp();
  return q | static_cast<uint32_t>(step) << 8;
}

// Calls body.template operator()<levels>() for the alphabet chosen at run time.
template <bool kFactored, typename Body>
__device__ __forceinline__ void WithLevels(int levels, const Body& body) {
  if constexpr (kFactored) {
    switch (levels) {
      case 3:
        return body.template operator()<3>();
      case 6:
        return body.template operator()<6>();
      default:
        return body.template operator()<12>();
    }
  } else {
    switch (levels) {
      case 4:
        return body.template operator()<4>();
      case 8:
        return body.template operator()<8>();
      default:
        return body.template operator()<16>();
    }
  }
}

__device__ __forceinline__ BlockCode CodeOfLevels(int levels) {
  return levels == 3    ? BlockCode::kLevels3
         : levels == 4  ? BlockCode::kLevels4
         : levels == 5  ? BlockCode::kLevels5
         : levels == 6  ? BlockCode::kLevels6
         : levels == 8  ? BlockCode::kLevels8
         : levels == 12 ? BlockCode::kLevels12
                        : BlockCode::kLevels16;
}

// The SCALES part: whole words. Returns its bytes.
template <bool kFactored>
__device__ __forceinline__ uint32_t StoreScales(const uint8_t* offsets, const float* norms,
                                                uint32_t head, int coded_rows, uint32_t* out,
                                                int thread) {
  const int bytes = kFactored ? 2 + (coded_rows + 1) / 2 : 2 * coded_rows;
  if (thread < (bytes + 3) / 4) {
    uint32_t word = 0;
    if constexpr (kFactored) {
      word = thread == 0 ? head : 0U;
      for (int i = thread == 0 ? 4 : 0; i < 8; ++i) {
        const int row = 8 * thread - 4 + i;
        word |= row < coded_rows ? static_cast<uint32_t>(offsets[row]) << (4 * i) : 0U;
      }
    } else {
      word = __float_as_uint(norms[2 * thread]);
      word |= 2 * thread + 1 < coded_rows ? __float_as_uint(norms[2 * thread + 1]) << 16 : 0U;
    }
    out[thread] = word;
  }
  return static_cast<uint32_t>(bytes);
}

__device__ __forceinline__ double TrueEnergy(const BlockInputSummary& input) {
  return scalbn(static_cast<double>(input.energy), -2 * input.shift);
}

template <int kDim, bool kFactored>
__device__ __forceinline__ void CodeBlock(const BlockKernelArguments& args, const BlockPlace& place,
                                          uint8_t* shared, BlockRecord* record, uint8_t* slot) {
  using Shape = BlockShape<kDim>;
  using At = SharedLayout<kDim>;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & 31;
  const int warp = thread >> 5;
  uint8_t* block = shared + At::kBlock;
  auto* values = reinterpret_cast<float*>(
      shared + (kFactored ? At::kRowValues : kBlockTokens * kDim * 2 + 128));
  auto* scratch =
      reinterpret_cast<float*>(shared + (kFactored ? At::kScratch : kBlockTokens * kDim * 2));
  BlockInputSummary input;
  switch (args.dtype) {
    case DType::kBf16:
      input = LoadBlock<kDim, DType::kBf16>(place, block, scratch, thread);
      break;
    case DType::kFp16:
      input = LoadBlock<kDim, DType::kFp16>(place, block, scratch, thread);
      break;
    default:
      input = LoadBlock<kDim, DType::kFp32>(place, block, scratch, thread);
  }
  const bool zero = input.largest == 0;
  if (zero || input.largest >= 0x7F800000U || input.exponent < -126 || input.exponent > 127) {
    if (thread == 0) {
      BlockRecord result{};
      result.code = static_cast<uint8_t>(zero ? BlockCode::kZero : BlockCode::kRaw);
      result.energy = input.largest < 0x7F800000U ? TrueEnergy(input) : static_cast<double>(NAN);
      *record = result;
    }
    return;
  }
  ResidualInput in;
  in.x = SharedAddress(block);
  in.panel = kFactored ? SharedAddress(shared + At::kResidual) : 0U;
  in.factors = reinterpret_cast<const float*>(shared + At::kFactors);
  in.rank = 0;
  in.rows = place.rows;
  in.raw_rows = place.raw_rows;
  in.block = block;
  in.values = values;
  const int first_token = warp * Shape::kTokensPerWarp;
  uint32_t scale_head = 0;
  float error = 0;
  if constexpr (kFactored) {
    CodeFactors<kDim>(shared, place, input.coded_energy, args.price[place.kind],
                      args.cap[place.kind], thread);
    in.rank = reinterpret_cast<const FactorPlan*>(shared + At::kPlan)->rank;
    MeasureRows<kDim>(in.x, in.panel, in.factors, in.rank, MakeHadamardFragment(lane), values,
                      first_token, lane);
    __syncthreads();
    // 16 points of the transform are in the squares (32 with the two halves).
    const float unit = rsqrtf(16.0F * ResidualShape<kDim>::kHalves * kDim) * (1.0F / 256);
    scale_head = ChooseScales<kDim>(values, shared + At::kOffsets, place.rows, place.raw_rows, unit,
                                    warp, lane, &error);
  }
  const int coded_rows = place.rows - place.raw_rows;
  uint32_t code_bytes = 0;
  WithLevels<kFactored>(args.levels, [&]<int kLevels>() {
    error += CodeRows<kDim, kLevels, kFactored>(in, first_token, lane);
    code_bytes = CodeBytes<kLevels>(static_cast<uint32_t>(coded_rows * kDim));
  });
  error = BlockSum<Shape::kWarps>(error, scratch, warp, lane);  // also: the digits are in place
  WithLevels<kFactored>(args.levels, [&]<int kLevels>() {
    PackBlock<kDim, kLevels>(block, place.rows, place.raw_rows,
                             reinterpret_cast<uint32_t*>(slot + args.slot.codes), thread);
  });
  uint32_t factor_bytes = 0;
  if (kFactored && in.rank > 0) {
    const auto* plan = reinterpret_cast<const FactorPlan*>(shared + At::kPlan);
    factor_bytes = (plan->first_bit[in.rank] + 7U) / 8;
    const auto* words = reinterpret_cast<const uint32_t*>(shared + At::kRecord);
    auto* out = reinterpret_cast<uint32_t*>(slot);
    for (uint32_t i = static_cast<uint32_t>(thread); i < (factor_bytes + 3) / 4;
         i += Shape::kThreads) {
      out[i] = words[i];
    }
  }
  const uint32_t scale_bytes = StoreScales<kFactored>(
      shared + At::kOffsets + place.raw_rows, values + place.raw_rows, scale_head, coded_rows,
      reinterpret_cast<uint32_t*>(slot + args.slot.scales), thread);
  if (thread == 0) {
    const bool keep_raw = factor_bytes + scale_bytes + code_bytes >=
                          static_cast<uint32_t>(coded_rows * kDim) * args.value_bytes;
    BlockRecord result{};
    result.code = static_cast<uint8_t>(keep_raw ? BlockCode::kRaw : CodeOfLevels(args.levels));
    if (!keep_raw) {
      result.exponent = static_cast<int16_t>(input.exponent);
      result.rank = static_cast<uint8_t>(in.rank);
      result.factor_bytes = static_cast<uint16_t>(factor_bytes);
      result.error = error;
    }
    result.energy = TrueEnergy(input);
    *record = result;
  }
}

template <int kDim, bool kFactored>
__global__ void __launch_bounds__(BlockShape<kDim>::kThreads, kDim == 256 ? 2 : 4)
    EncodeBlocksKernel(const BlockKernelArguments args) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const EncodeJob& job = args.jobs[blockIdx.y];
  const uint32_t per_head = (job.tokens + kBlockTokens - 1) / kBlockTokens;
  // Heads next to each other share pages of memory: they are the fastest index.
  const uint32_t head = blockIdx.x % args.kv_heads;
  const uint32_t rest = blockIdx.x / args.kv_heads;
  const uint32_t kind = rest / per_head;
  const uint32_t index = rest % per_head;
  if (kind > 1) {
    return;
  }
  BlockPlace place;
  place.tensor = kind == 0 ? &job.k : &job.v;
  place.kind = kind;
  place.head = head;
  place.first_row = index * kBlockTokens;
  place.rows = static_cast<int>(min(kBlockTokens, job.tokens - place.first_row));
  place.raw_rows = static_cast<int>(
      min(static_cast<uint32_t>(place.rows), job.raw_rows - min(job.raw_rows, place.first_row)));
  const uint64_t number =
      uint64_t{blockIdx.y} * args.blocks_per_job + (kind * args.kv_heads + head) * per_head + index;
  CodeBlock<kDim, kFactored>(args, place, shared, args.records + number,
                             args.slots + number * args.slot.bytes);
}

}  // namespace kvshrink::cuda
