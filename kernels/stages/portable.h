// Marks the functions of this folder, which run on the host and, compiled by nvcc, on the device:
// the arithmetic of a stage lives here once, the loops around it are each backend's own.
#pragma once

#if defined(__CUDACC__)
#define KVS_FN __host__ __device__ inline
#else
#define KVS_FN inline
#endif
