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

// Four values, of magnitudes that the type can hold, to consecutive places from a multiple of four
// on, if `wanted`: without a branch.
template <typename Out>
__device__ inline void StoreIf(bool wanted, typename Out::Value* to, const float (&x)[4]) {
  const auto address = reinterpret_cast<unsigned long long>(to);
  if constexpr (Out::kDType == 0) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v4.f32 [%1], {%2,%3,%4,%5}; }" ::"r"(
            static_cast<uint32_t>(wanted)),
        "l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
        : "memory");
  } else {
    uint32_t words[2];
    if constexpr (Out::kDType == 1) {
      const __half2 low = __floats2half2_rn(x[0], x[1]);
      const __half2 high = __floats2half2_rn(x[2], x[3]);
      words[0] = *reinterpret_cast<const uint32_t*>(&low);
      words[1] = *reinterpret_cast<const uint32_t*>(&high);
    } else {
      const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]);
      const __nv_bfloat162 high = __floats2bfloat162_rn(x[2], x[3]);
      words[0] = *reinterpret_cast<const uint32_t*>(&low);
      words[1] = *reinterpret_cast<const uint32_t*>(&high);
    }
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v2.b32 [%1], {%2,%3}; }" ::"r"(
                     static_cast<uint32_t>(wanted)),
                 "l"(address), "r"(words[0]), "r"(words[1])
                 : "memory");
  }
}

// First errors win only in that a shard's word stops being 0: which block is told isn't fixed.
__device__ inline void Report(uint64_t* status, uint32_t shard, ShardField field, uint32_t block) {
  atomicCAS(reinterpret_cast<unsigned long long*>(status) + shard, 0ULL,
            (static_cast<unsigned long long>(field) << 32) | block);
}

}  // namespace kvshrink::cuda
