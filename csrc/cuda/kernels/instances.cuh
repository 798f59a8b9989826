// Entry points of the lists in tiles.h, for both element types, and their lines in the tables of kernels.
#pragma once

#include "cuda/tiles.h"
#include "gemm.cuh"
#include "one_launch.cuh"
#include "pass.cuh"
#include "small.cuh"

#define LORADASH_GEMM_ENTRY(dtype, T, order, columns, name, m, n, depth, warps_m, warps_n, stages, aligned)     \
  extern "C" __global__ void __launch_bounds__(loradash::cuda::gemm_threads(warps_m, warps_n),                  \
                                               loradash::cuda::gemm_resident(stages))                           \
      gemm_##order##_##dtype##_##name(const __grid_constant__ loradash::cuda::GemmParams params) {              \
    loradash::cuda::gemm<loradash::cuda::GemmTile<T, m, n, depth, warps_m, warps_n, stages, columns, aligned>>( \
        params);                                                                                                \
  }
#define LORADASH_GEMM(...)                              \
  LORADASH_GEMM_ENTRY(bf16, __nv_bfloat16, __VA_ARGS__) \
  LORADASH_GEMM_ENTRY(f16, __half, __VA_ARGS__)

#define LORADASH_PASS_ENTRY(dtype, T, suffix, aligned, name, project, reduce, blocks)                        \
  extern "C" __global__ void __launch_bounds__(loradash::cuda::kPassThreads,                                 \
                                               loradash::cuda::PassKind{project, reduce, blocks}.resident()) \
      name##_##dtype##suffix(const __grid_constant__ loradash::cuda::PassParams params) {                    \
    loradash::cuda::pass<loradash::cuda::PassTile<T, project, reduce, blocks, aligned>>(params);             \
  }
#define LORADASH_PASS(...)                                           \
  LORADASH_PASS_ENTRY(bf16, __nv_bfloat16, , true, __VA_ARGS__)      \
  LORADASH_PASS_ENTRY(f16, __half, , true, __VA_ARGS__)              \
  LORADASH_PASS_ENTRY(bf16, __nv_bfloat16, _any, false, __VA_ARGS__) \
  LORADASH_PASS_ENTRY(f16, __half, _any, false, __VA_ARGS__)

// The prefix is "" in the forward pass and "dx_" for dx; `pass` is one of the PassKinds that share a launch.
#define LORADASH_ONE_LAUNCH_ENTRY(dtype, T, order, columns, prefix, second, pass, name, m, n, depth, warps_m, warps_n, \
                                  stages)                                                                              \
  extern "C" __global__ void __launch_bounds__(loradash::cuda::gemm_threads(warps_m, warps_n),                         \
                                               loradash::cuda::kOneLaunchResident)                                     \
      prefix##name##_##order##_##dtype(const __grid_constant__ loradash::cuda::OneLaunchParams params) {               \
    using namespace loradash::cuda;                                                                                    \
    one_launch<GemmTile<T, m, n, depth, warps_m, warps_n, stages, columns, true>,                                      \
               PassTile<T, pass.project, pass.reduce, pass.blocks, true>, Second::second>(params);                     \
  }
#define LORADASH_ONE_LAUNCH(...)                                             \
  LORADASH_ONE_LAUNCH_ENTRY(bf16, __nv_bfloat16, rows, false, __VA_ARGS__)   \
  LORADASH_ONE_LAUNCH_ENTRY(f16, __half, rows, false, __VA_ARGS__)           \
  LORADASH_ONE_LAUNCH_ENTRY(bf16, __nv_bfloat16, columns, true, __VA_ARGS__) \
  LORADASH_ONE_LAUNCH_ENTRY(f16, __half, columns, true, __VA_ARGS__)

#define LORADASH_SMALL(name, Params, call)                                    \
  extern "C" __global__ void __launch_bounds__(loradash::cuda::kSmallThreads) \
      name(const __grid_constant__ loradash::cuda::Params params) {           \
    loradash::cuda::call(params);                                             \
  }

// These write lines of a table of kernels: one by its name, or a list's entry in every dtype, order and alignment.
#define LORADASH_LISTED(kernel) {#kernel, reinterpret_cast<const void*>(&kernel)},
#define LORADASH_LIST_PASS(name, ...) \
  LORADASH_LISTED(name##_bf16)        \
  LORADASH_LISTED(name##_f16)         \
  LORADASH_LISTED(name##_bf16_any)    \
  LORADASH_LISTED(name##_f16_any)
#define LORADASH_LIST_ONE_LAUNCH(prefix, name) \
  LORADASH_LISTED(prefix##name##_rows_bf16)    \
  LORADASH_LISTED(prefix##name##_rows_f16)     \
  LORADASH_LISTED(prefix##name##_columns_bf16) \
  LORADASH_LISTED(prefix##name##_columns_f16)
