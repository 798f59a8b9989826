// The forward kernels: packing of the low-rank operands, down-projection with dropout, and the product over rows of W
// (N, K).
#include "cuda/kernels/instances.cuh"
#include "cuda/launch.h"

#define PRODUCT(...) LORADASH_GEMM(rows, false, __VA_ARGS__)
LORADASH_GEMM_TILES(PRODUCT)

LORADASH_DOWN_PASSES(LORADASH_PASS)

#define ONE_LAUNCH(...) LORADASH_ONE_LAUNCH(, kGoesOnBare, kOneLaunchX, __VA_ARGS__)
LORADASH_ONE_LAUNCH_TILES(ONE_LAUNCH)

LORADASH_SMALL(pack_bf16, PackParams, pack<__nv_bfloat16>)
LORADASH_SMALL(pack_f16, PackParams, pack<__half>)

namespace loradash::cuda {

KernelTable forward_kernels() {
#define LIST_PRODUCT(name, ...) LORADASH_LISTED(gemm_rows_bf16_##name) LORADASH_LISTED(gemm_rows_f16_##name)
#define LIST_ONE_LAUNCH(name, ...) LORADASH_LIST_ONE_LAUNCH(, name)
  return {LORADASH_GEMM_TILES(LIST_PRODUCT) LORADASH_DOWN_PASSES(LORADASH_LIST_PASS)
              LORADASH_ONE_LAUNCH_TILES(LIST_ONE_LAUNCH) LORADASH_LISTED(pack_bf16) LORADASH_LISTED(pack_f16)};
}

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }

}  // namespace loradash::cuda
