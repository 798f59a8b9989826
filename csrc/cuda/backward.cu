// The backward kernels: the pass over dy (G, dB, db), the product over columns of W (dx), the pass over x (dA), the
// second stage of the sums over M.
#include "cuda/kernels/instances.cuh"
#include "cuda/launch.h"

#define COLUMNS_BF16(...) LORADASH_GEMM_ENTRY(bf16, __nv_bfloat16, columns, true, __VA_ARGS__)
#define COLUMNS_F16(...) LORADASH_GEMM_ENTRY(f16, __half, columns, true, __VA_ARGS__)
LORADASH_GEMM_TILES(COLUMNS_BF16)
LORADASH_GEMM_TILES(COLUMNS_F16)

#define PASS_BF16(...) LORADASH_PASS_ENTRY(bf16, __nv_bfloat16, , true, __VA_ARGS__)
#define PASS_F16(...) LORADASH_PASS_ENTRY(f16, __half, , true, __VA_ARGS__)
#define PASS_BF16_ANY(...) LORADASH_PASS_ENTRY(bf16, __nv_bfloat16, _any, false, __VA_ARGS__)
#define PASS_F16_ANY(...) LORADASH_PASS_ENTRY(f16, __half, _any, false, __VA_ARGS__)
LORADASH_BACKWARD_TILES(PASS_BF16)
LORADASH_BACKWARD_TILES(PASS_F16)
LORADASH_BACKWARD_TILES(PASS_BF16_ANY)
LORADASH_BACKWARD_TILES(PASS_F16_ANY)

#define DX_ROWS_BF16(...) \
  LORADASH_ONE_LAUNCH_ENTRY(bf16, __nv_bfloat16, rows, false, dx_, kMasked, 4, 3, 2, __VA_ARGS__)
#define DX_ROWS_F16(...) LORADASH_ONE_LAUNCH_ENTRY(f16, __half, rows, false, dx_, kMasked, 4, 3, 2, __VA_ARGS__)
#define DX_COLUMNS_BF16(...) \
  LORADASH_ONE_LAUNCH_ENTRY(bf16, __nv_bfloat16, columns, true, dx_, kMasked, 4, 3, 2, __VA_ARGS__)
#define DX_COLUMNS_F16(...) LORADASH_ONE_LAUNCH_ENTRY(f16, __half, columns, true, dx_, kMasked, 4, 3, 2, __VA_ARGS__)
LORADASH_ONE_LAUNCH_TILES(DX_ROWS_BF16)
LORADASH_ONE_LAUNCH_TILES(DX_ROWS_F16)
LORADASH_ONE_LAUNCH_TILES(DX_COLUMNS_BF16)
LORADASH_ONE_LAUNCH_TILES(DX_COLUMNS_F16)

LORADASH_SMALL_ENTRY(finish_sums, FinishParams, finish)

namespace loradash::cuda {

const void* find_backward_kernel(const std::string& name) {
#define FIND(entry) \
  if (name == #entry) return reinterpret_cast<const void*>(&entry);
#define FIND_GEMM(name, ...) FIND(gemm_columns_bf16_##name) FIND(gemm_columns_f16_##name)
#define FIND_PASS(name, ...) FIND(name##_bf16) FIND(name##_f16) FIND(name##_bf16_any) FIND(name##_f16_any)
  LORADASH_GEMM_TILES(FIND_GEMM)
  LORADASH_BACKWARD_TILES(FIND_PASS)
#define FIND_ONE(name, ...) \
  FIND(dx_##name##_rows_bf16) FIND(dx_##name##_rows_f16) FIND(dx_##name##_columns_bf16) FIND(dx_##name##_columns_f16)
  LORADASH_ONE_LAUNCH_TILES(FIND_ONE)
  FIND(finish_sums)
  return nullptr;
}

}  // namespace loradash::cuda
