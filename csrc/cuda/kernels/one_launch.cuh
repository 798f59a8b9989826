// A large product and the pass over its left operand in one persistent launch: the forward (the down-projection of x,
// then [x | T] [W | Q]^T), or dx with the pass over dy (G, dB, db, then dy W plus the masked T D).
//
// The first program to arrive at a block of rows runs the pass over these rows, releases a flag, and then takes its own
// tile, whose rows it finds in L2. The others wait for the flag when the large part of their tile is done. Only the
// first to arrive is ever waited for, and it waits for none: programs need not be resident together. FLOPs and bytes
// are those of separate launches, except that the left operand comes once from memory, and one launch less fills and
// drains.
#pragma once

#include "gemm.cuh"
#include "order.cuh"
#include "pass.cuh"

namespace loradash::cuda {

// This is not inlined: its addresses would be worked out before the loop over tiles, and held through the product.
template <typename Over>
__device__ __noinline__ void pass_rows(const PassParams& p, char* shared, int tile_m) {
  pass_slot<Over>(p, shared, 0, 1, tile_m, 0);
}

template <typename Tile, typename Over, Second kSecond>
__device__ __forceinline__ void one_launch(const OneLaunchParams& p) {
  static_assert(Tile::kThreads == Over::kThreads && Tile::kM % Over::kM == 0);
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
      pass_rows<Over>(p.pass, shared, tile_m);
      __syncthreads();
      if (threadIdx.x == 0) release(p.state + g.tiles_m + row);
    }
    multiply<Tile, kSecond>(g, shared, tile_m * Tile::kM, tile_n * Tile::kN, [&] {
      if (ticket == 0) return;
      if (threadIdx.x == 0) await(p.state + g.tiles_m + row);
      __syncthreads();
    });
    __syncthreads();
    if (threadIdx.x == 0) tile += gridDim.x;
  }
}

}  // namespace loradash::cuda
