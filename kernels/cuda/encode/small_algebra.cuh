// Algebra of 16 x 16 matrices in one warp. Matrices in shared memory are row-major, stride 16.
#pragma once

#include <cuda_runtime.h>

#include "cuda/encode/warp_math.cuh"
#include "stages/subspace.h"

namespace kvshrink::cuda {

inline constexpr int kP = stages::kProbes;

// What becomes of the triangular factor W = R^-1 of g = R^T R.
enum class Scaling {
  kOrthonormal,  // W: columns of Z W are orthonormal
  kInverse,      // W diag(64 / r_jj): longer, the smaller the component
};

// In: g, symmetric. Out: w, upper triangular, in its place. A column that the earlier ones span
// (its square is below `floor` of what it was, or below `tiny`) becomes zero. One warp.
// Lane j < 16 holds column j of g, lane 16 + j column j of the identity; eliminating both gives
// the inverse of the lower factor.
template <Scaling kScaling>
__device__ __forceinline__ void InvertCholesky(float* g, int lane, float floor, float tiny) {
  float a[kP];
  const int column = lane & 15;
  if (lane < kP) {
#pragma unroll
    for (int i = 0; i < kP; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(g + column * kP + i);
      a[i] = four.x;
      a[i + 1] = four.y;
      a[i + 2] = four.z;
      a[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kP; ++i) {
      a[i] = i == column ? 1.0F : 0.0F;
    }
  }
  float diagonal = 0;
#pragma unroll
  for (int i = 0; i < kP; ++i) {
    diagonal = i == column ? a[i] : diagonal;
  }
  const float least = fmaxf(floor * diagonal, tiny);
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kP; ++k) {
    float inverse = a[k] > least ? FastReciprocal(a[k]) : 0.0F;
    inverse = __shfl_sync(kAllLanes, inverse, k);
    const float row = a[k] * inverse;
#pragma unroll
    for (int i = k + 1; i < kP; ++i) {
      a[i] -= __shfl_sync(kAllLanes, a[k], i) * row;
    }
    a[k] *= kScaling == Scaling::kInverse ? 64.0F * inverse : sqrtf(inverse);
  }
  if (lane >= kP) {
#pragma unroll
    for (int i = 0; i < kP; i += 4) {
      *reinterpret_cast<float4*>(g + column * kP + i) =
          make_float4(a[i], a[i + 1], a[i + 2], a[i + 3]);
    }
  }
  __syncwarp();
}

// Eigenvectors of a symmetric matrix by cyclic Jacobi, `sweeps` times over all pairs. The pairs of
// step x are (i, i ^ x). Lane c < 16 holds column c of t, lane 16 + c column c of the rotations so
// far, both with row c ^ k in a[k], so that every register index is known to the compiler.
// Out: a[] as said; a[0] of lane c is eigenvalue c.
__device__ __forceinline__ void Jacobi(float (&a)[kP], int lane, int sweeps) {
  const int column = lane & 15;
  const bool is_matrix = lane < kP;
  for (int sweep = 0; sweep < sweeps; ++sweep) {
#pragma unroll
    for (int x = 1; x < kP; ++x) {
      const float own = a[0];
      const float other = __shfl_xor_sync(kAllLanes, own, x);
      const float off = a[x];
      const float gap = other - own;
      const float twice = 2 * off;
      // t = sgn(gap) 2 off / (|gap| + sqrt(gap^2 + 4 off^2)), from this column's side
      const float root = fabsf(gap) + sqrtf(fmaf(gap, gap, twice * twice));
      const bool up = gap > 0 || (gap == 0 && column < (column ^ x));
      float tangent = root > 1e-30F ? __fdividef(twice, root) : 0.0F;
      tangent = up ? tangent : -tangent;
      float cosine = rsqrtf(fmaf(tangent, tangent, 1.0F));
      float sine = tangent * cosine;
      cosine = __shfl_sync(kAllLanes, cosine, column);
      sine = __shfl_sync(kAllLanes, sine, column);
      float b[kP];
#pragma unroll
      for (int k = 0; k < kP; ++k) {
        b[k] = __shfl_xor_sync(kAllLanes, a[k ^ x], x);
      }
#pragma unroll
      for (int k = 0; k < kP; ++k) {
        a[k] = cosine * a[k] - sine * b[k];
      }
#pragma unroll
      for (int k = 0; k < kP; ++k) {
        const int partner = k ^ x;
        if (k < partner) {
          // Row column ^ k takes the rotation of column column ^ k.
          float row_cosine = __shfl_xor_sync(kAllLanes, cosine, k);
          float row_sine = __shfl_xor_sync(kAllLanes, sine, k);
          row_cosine = is_matrix ? row_cosine : 1.0F;
          row_sine = is_matrix ? row_sine : 0.0F;
          const float first = a[k];
          const float second = a[partner];
          a[k] = row_cosine * first - row_sine * second;
          a[partner] = row_cosine * second + row_sine * first;
        }
      }
    }
  }
}

}  // namespace kvshrink::cuda
