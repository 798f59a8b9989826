// Entry points of the lists in gpu_tiles.h for both element types, and the tables that find them by name.
#pragma once

#include "../gpu_tiles.h"
#include "gemm.cuh"
#include "one_launch.cuh"
#include "pass.cuh"
#include "small.cuh"

#define LORADASH_GEMM_ENTRY(dtype, T, order, columns, name, m, n, depth, warps_m, warps_n, stages, aligned)           \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n)                                                \
      gemm_##order##_##dtype##_##name(const __grid_constant__ loradash::gpu::GemmParams params) {                     \
    loradash::gpu::gemm<loradash::gpu::GemmTile<T, m, n, depth, warps_m, warps_n, stages, columns, aligned>>(params); \
  }
#define LORADASH_PASS_ENTRY(dtype, T, suffix, aligned, name, project, reduce, blocks)          \
  extern "C" __global__ void __launch_bounds__(128, project&& reduce ? 1 : 3)                  \
      name##_##dtype##suffix(const __grid_constant__ loradash::gpu::PassParams params) {       \
    loradash::gpu::pass<loradash::gpu::PassTile<T, project, reduce, blocks, aligned>>(params); \
  }
// kind: "" for the forward, "dx_" for dx.
#define LORADASH_ONE_LAUNCH_ENTRY(dtype, T, order, columns, kind, second, project, reduce, blocks, name, m, n, depth, \
                                  warps_m, warps_n, stages)                                                           \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, 2)                                             \
      kind##name##_##order##_##dtype(const __grid_constant__ loradash::gpu::OneLaunchParams params) {                 \
    loradash::gpu::one_launch<loradash::gpu::GemmTile<T, m, n, depth, warps_m, warps_n, stages, columns, true>,       \
                              loradash::gpu::PassTile<T, project, reduce, blocks, true>,                              \
                              loradash::gpu::Second::second>(params);                                                 \
  }
#define LORADASH_SMALL_ENTRY(name, Params, call)                                                                 \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ loradash::gpu::Params params) { \
    loradash::gpu::call(params);                                                                                 \
  }
