// Matrix instructions of one warp: m16n8k16 and m16n8k8, fp16 in, fp32 sums; 8x8 tiles from shared
// memory. Lane l holds, with g = l / 4 and t = l % 4: of A rows g and g + 8, columns 2t, 2t + 1
// (and those plus 8); of B column g, the same k; of the sums rows g and g + 8, columns 2t, 2t + 1.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace kvshrink::cuda {

__device__ inline void Mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void Mma8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Four tiles; lane l gives the address of row l % 8 of tile l / 8.
__device__ inline void LoadTiles(uint32_t (&x)[4], const __half* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ inline void LoadTilesTransposed(uint32_t (&x)[4], const __half* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// x as the sum of two halfs, within 2^-22 of it (or 2^-25 where it is small). |x| < 65504.
struct SplitHalf {
  __half high, low;
};

__device__ inline SplitHalf Split(float x) {
  const __half high = __float2half_rn(x);
  return {high, __float2half_rn(x - __half2float(high))};
}

__device__ inline uint32_t PackHalves(__half a, __half b) {
  return static_cast<uint32_t>(__half_as_ushort(a)) |
         (static_cast<uint32_t>(__half_as_ushort(b)) << 16);
}

}  // namespace kvshrink::cuda
