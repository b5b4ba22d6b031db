// Where decoded values go, and how they are rounded.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/view.h"
#include "stages/minifloat.h"

namespace kvshrink::cuda {

struct Fp32Out {
  using Value = float;
  static constexpr float kLargest = 3.40282347e38F;
  static constexpr uint32_t kDType = 0;
  __device__ static float Round(float x) { return x; }
};
struct Fp16Out {
  using Value = uint16_t;
  static constexpr float kLargest = 65504.0F;
  static constexpr uint32_t kDType = 1;
  __device__ static uint16_t Round(float x) { return stages::FloatToFp16(x); }
};
struct Bf16Out {
  using Value = uint16_t;
  static constexpr float kLargest = 3.38953139e38F;
  static constexpr uint32_t kDType = 2;
  __device__ static uint16_t Round(float x) { return stages::FloatToBf16(x); }
};

// Offset of element (token, head, 0) in elements.
__device__ inline uint64_t PlaceOf(const TensorLayout& layout, const int32_t* block_table,
                                   uint32_t token, uint32_t head) {
  uint64_t page = 0;
  uint32_t row = token;
  if (layout.page_tokens != 0) {
    page = token / layout.page_tokens;
    row = token % layout.page_tokens;
    if (block_table != nullptr) {
      page = static_cast<uint64_t>(static_cast<int64_t>(block_table[page]));
    }
  }
  return page * layout.page_stride + row * layout.token_stride + head * layout.head_stride;
}

__device__ inline float Clamp(float x, float largest) { return fminf(fmaxf(x, -largest), largest); }

// Four values, of magnitudes that the type can hold, to consecutive places; `aligned`: the first is
// at a multiple of four.
__device__ inline void StoreFour(float* to, bool aligned, float a, float b, float c, float d) {
  if (aligned) {
    *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
  } else {
    to[0] = a;
    to[1] = b;
    to[2] = c;
    to[3] = d;
  }
}

__device__ inline void StoreWords(uint16_t* to, bool aligned, uint32_t low, uint32_t high) {
  if (aligned) {
    *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
  } else {
    to[0] = static_cast<uint16_t>(low);
    to[1] = static_cast<uint16_t>(low >> 16);
    to[2] = static_cast<uint16_t>(high);
    to[3] = static_cast<uint16_t>(high >> 16);
  }
}

template <typename Out>
__device__ inline void Store(typename Out::Value* to, bool aligned, const float (&x)[4]) {
  if constexpr (Out::kDType == 0) {
    StoreFour(to, aligned, x[0], x[1], x[2], x[3]);
  } else if constexpr (Out::kDType == 1) {
    const __half2 low = __floats2half2_rn(x[0], x[1]);
    const __half2 high = __floats2half2_rn(x[2], x[3]);
    StoreWords(to, aligned, *reinterpret_cast<const uint32_t*>(&low),
               *reinterpret_cast<const uint32_t*>(&high));
  } else {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]);
    const __nv_bfloat162 high = __floats2bfloat162_rn(x[2], x[3]);
    StoreWords(to, aligned, *reinterpret_cast<const uint32_t*>(&low),
               *reinterpret_cast<const uint32_t*>(&high));
  }
}

// First errors win only in that a shard's word stops being 0: which block is told isn't fixed.
__device__ inline void Report(uint64_t* status, uint32_t shard, ShardField field, uint32_t block) {
  atomicCAS(reinterpret_cast<unsigned long long*>(status) + shard, 0ULL,
            (static_cast<unsigned long long>(field) << 32) | block);
}

}  // namespace kvshrink::cuda
