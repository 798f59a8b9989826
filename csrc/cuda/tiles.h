// Every kernel that is compiled, by tile: the .cu files instantiate these lists, and the plan chooses from them.
#pragma once

// name suffix, rows, columns, depth of a tile; warps along each; stages of the pipeline.
// Aligned: 16-byte rows. The last serves what is not ("any").
#define LORADASH_GEMM_TILES(GEMM)            \
  GEMM(128x256, 128, 256, 32, 2, 4, 4, true) \
  GEMM(128x128, 128, 128, 32, 2, 2, 3, true) \
  GEMM(64x128, 64, 128, 32, 2, 2, 4, true)   \
  GEMM(64x64, 64, 64, 32, 2, 2, 4, true)     \
  GEMM(64x64_any, 64, 64, 32, 2, 2, 3, false)

// The forward in one launch, whose programs also run the pass over x: four warps.
#define LORADASH_ONE_LAUNCH_TILES(ONE)           \
  ONE(one_launch_128x128, 128, 128, 32, 2, 2, 3) \
  ONE(one_launch_64x128, 64, 128, 32, 2, 2, 4)

// name suffix; ranks in eights that are projected on and reduced with; blocks of 128 columns.
#define LORADASH_DOWN_TILES(PASS) \
  PASS(down_32, 4, 0, 1)          \
  PASS(down_64, 8, 0, 1)
#define LORADASH_BACKWARD_TILES(PASS) \
  PASS(dy_32_24, 4, 3, 4)             \
  PASS(dy_32_32, 4, 4, 2)             \
  PASS(dy_64_64, 8, 8, 1)             \
  PASS(x_16, 0, 2, 1)                 \
  PASS(x_32, 0, 4, 1)                 \
  PASS(x_64, 0, 8, 1)
