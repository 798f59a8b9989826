// Entry points of the lists in tiles.h for both element types, and the tables that find them by name.
#pragma once

#include "cuda/tiles.h"
#include "gemm.cuh"
#include "one_launch.cuh"
#include "pass.cuh"
#include "small.cuh"

#define LORADASH_GEMM_ENTRY(dtype, T, order, columns, name, m, n, depth, warps_m, warps_n, stages, aligned)     \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n)                                          \
      gemm_##order##_##dtype##_##name(const __grid_constant__ loradash::cuda::GemmParams params) {              \
    loradash::cuda::gemm<loradash::cuda::GemmTile<T, m, n, depth, warps_m, warps_n, stages, columns, aligned>>( \
        params);                                                                                                \
  }
#define LORADASH_PASS_ENTRY(dtype, T, suffix, aligned, name, project, reduce, blocks)            \
  extern "C" __global__ void __launch_bounds__(128, project&& reduce ? 1 : 3)                    \
      name##_##dtype##suffix(const __grid_constant__ loradash::cuda::PassParams params) {        \
    loradash::cuda::pass<loradash::cuda::PassTile<T, project, reduce, blocks, aligned>>(params); \
  }
// kind: "" for the forward, "dx_" for dx.
#define LORADASH_ONE_LAUNCH_ENTRY(dtype, T, order, columns, kind, second, project, reduce, blocks, name, m, n, depth, \
                                  warps_m, warps_n, stages)                                                           \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, 2)                                             \
      kind##name##_##order##_##dtype(const __grid_constant__ loradash::cuda::OneLaunchParams params) {                \
    loradash::cuda::one_launch<loradash::cuda::GemmTile<T, m, n, depth, warps_m, warps_n, stages, columns, true>,     \
                               loradash::cuda::PassTile<T, project, reduce, blocks, true>,                            \
                               loradash::cuda::Second::second>(params);                                               \
  }
#define LORADASH_SMALL_ENTRY(name, Params, call)                                                                  \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ loradash::cuda::Params params) { \
    loradash::cuda::call(params);                                                                                 \
  }
