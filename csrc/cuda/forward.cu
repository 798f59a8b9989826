// The forward kernels: packing of the low-rank operands, down-projection with dropout, and the product over rows of W
// (N, K).
#include "cuda/kernels/instances.cuh"
#include "cuda/launch.h"

#define ROWS_BF16(...) LORADASH_GEMM_ENTRY(bf16, __nv_bfloat16, rows, false, __VA_ARGS__)
#define ROWS_F16(...) LORADASH_GEMM_ENTRY(f16, __half, rows, false, __VA_ARGS__)
LORADASH_GEMM_TILES(ROWS_BF16)
LORADASH_GEMM_TILES(ROWS_F16)

#define DOWN_BF16(...) LORADASH_PASS_ENTRY(bf16, __nv_bfloat16, , true, __VA_ARGS__)
#define DOWN_F16(...) LORADASH_PASS_ENTRY(f16, __half, , true, __VA_ARGS__)
#define DOWN_BF16_ANY(...) LORADASH_PASS_ENTRY(bf16, __nv_bfloat16, _any, false, __VA_ARGS__)
#define DOWN_F16_ANY(...) LORADASH_PASS_ENTRY(f16, __half, _any, false, __VA_ARGS__)
LORADASH_DOWN_TILES(DOWN_BF16)
LORADASH_DOWN_TILES(DOWN_F16)
LORADASH_DOWN_TILES(DOWN_BF16_ANY)
LORADASH_DOWN_TILES(DOWN_F16_ANY)

#define ONE_ROWS_BF16(...) \
  LORADASH_ONE_LAUNCH_ENTRY(bf16, __nv_bfloat16, rows, false, , kGoesOnBare, 4, 0, 1, __VA_ARGS__)
#define ONE_ROWS_F16(...) LORADASH_ONE_LAUNCH_ENTRY(f16, __half, rows, false, , kGoesOnBare, 4, 0, 1, __VA_ARGS__)
#define ONE_COLUMNS_BF16(...) \
  LORADASH_ONE_LAUNCH_ENTRY(bf16, __nv_bfloat16, columns, true, , kGoesOnBare, 4, 0, 1, __VA_ARGS__)
#define ONE_COLUMNS_F16(...) LORADASH_ONE_LAUNCH_ENTRY(f16, __half, columns, true, , kGoesOnBare, 4, 0, 1, __VA_ARGS__)
LORADASH_ONE_LAUNCH_TILES(ONE_ROWS_BF16)
LORADASH_ONE_LAUNCH_TILES(ONE_ROWS_F16)
LORADASH_ONE_LAUNCH_TILES(ONE_COLUMNS_BF16)
LORADASH_ONE_LAUNCH_TILES(ONE_COLUMNS_F16)

LORADASH_SMALL_ENTRY(pack_bf16, PackParams, pack<__nv_bfloat16>)
LORADASH_SMALL_ENTRY(pack_f16, PackParams, pack<__half>)

namespace loradash::cuda {

const void* find_forward_kernel(const std::string& name) {
#define FIND(entry) \
  if (name == #entry) return reinterpret_cast<const void*>(&entry);
#define FIND_GEMM(name, ...) FIND(gemm_rows_bf16_##name) FIND(gemm_rows_f16_##name)
#define FIND_PASS(name, ...) FIND(name##_bf16) FIND(name##_f16) FIND(name##_bf16_any) FIND(name##_f16_any)
  LORADASH_GEMM_TILES(FIND_GEMM)
  LORADASH_DOWN_TILES(FIND_PASS)
#define FIND_ONE(name, ...) \
  FIND(name##_rows_bf16) FIND(name##_rows_f16) FIND(name##_columns_bf16) FIND(name##_columns_f16)
  LORADASH_ONE_LAUNCH_TILES(FIND_ONE)
  FIND(pack_bf16)
  FIND(pack_f16)
  return nullptr;
}

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }

}  // namespace loradash::cuda
