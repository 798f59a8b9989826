// The whole forward in one persistent launch, but for the packing of the adapters.
//
// The first program to arrive at a block of rows runs the down-projection of these rows, releases a flag, and then
// takes its own tile, whose rows of x it finds in L2. The others wait for the flag when their K loop has come to the
// rank columns. Only the first to arrive is ever waited for, and it waits for nobody: programs need not be resident
// together. FLOPs and bytes of two launches, but x once from memory and no second launch to fill and drain.
#pragma once

#include "gemm.cuh"
#include "pass.cuh"

namespace loradash::gpu {

// Not inlined: its addresses would be worked out before the loop over tiles, and held through the product.
template <typename Down>
__device__ __noinline__ void project_rows(const PassParams& p, char* shared, int tile_m) {
  Pass<Down>(p, shared, 0, 1, tile_m, 0).run();
}

template <typename Tile, typename Down>
__device__ __forceinline__ void one_launch(const OneLaunchParams& p) {
  static_assert(Tile::kThreads == Down::kThreads && Tile::kM % Down::kM == 0);
  extern __shared__ __align__(256) char shared[];
  // What a program must remember of its tile lies in shared memory: the product takes every register.
  __shared__ int tile, row, ticket;
  const GemmParams& g = p.gemm;
  if (threadIdx.x == 0) tile = blockIdx.x;
  while (true) {
    __syncthreads();
    if (tile >= g.tiles_m * g.tiles_n) return;
    int tile_m, tile_n;
    rasterise(g, tile, tile_m, tile_n);
    if (threadIdx.x == 0) row = tile_m, ticket = atomicAdd(p.state + tile_m, 1);
    __syncthreads();
    if (ticket == 0) {
      project_rows<Down>(p.down, shared, tile_m);
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicExch(p.state + g.tiles_m + row, 1);
    }
    multiply<Tile, false>(g, shared, tile_m * Tile::kM, tile_n * Tile::kN, [&] {
      if (ticket == 0) return;
      if (threadIdx.x == 0) {
        while (atomicAdd(p.state + g.tiles_m + row, 0) == 0) __nanosleep(64);
        __threadfence();
      }
      __syncthreads();
    });
    __syncthreads();
    if (threadIdx.x == 0) tile += gridDim.x;
  }
}

}  // namespace loradash::gpu
