// The backward kernels: the pass over dy (G, dB, db), the product over columns of W (dx), the pass over x (dA), the
// second stage of the sums over M.
#include "cuda/kernels/instances.cuh"
#include "cuda/launch.h"

#define PRODUCT(...) LORADASH_GEMM(columns, true, __VA_ARGS__)
LORADASH_GEMM_TILES(PRODUCT)

LORADASH_DY_PASSES(LORADASH_PASS)
LORADASH_X_PASSES(LORADASH_PASS)

#define ONE_LAUNCH(...) LORADASH_ONE_LAUNCH(dx_, kMasked, kOneLaunchDy, __VA_ARGS__)
LORADASH_ONE_LAUNCH_TILES(ONE_LAUNCH)

LORADASH_SMALL(finish_sums, FinishParams, finish)

namespace loradash::cuda {

KernelTable backward_kernels() {
#define LIST_PRODUCT(name, ...) LORADASH_LISTED(gemm_columns_bf16_##name) LORADASH_LISTED(gemm_columns_f16_##name)
#define LIST_ONE_LAUNCH(name, ...) LORADASH_LIST_ONE_LAUNCH(dx_, name)
  return {LORADASH_GEMM_TILES(LIST_PRODUCT) LORADASH_DY_PASSES(LORADASH_LIST_PASS) LORADASH_X_PASSES(LORADASH_LIST_PASS)
              LORADASH_ONE_LAUNCH_TILES(LIST_ONE_LAUNCH) LORADASH_LISTED(finish_sums)};
}

}  // namespace loradash::cuda
