// What the threads of one program wrote, made visible to the threads of another: counters and flags in global memory.
//
// One thread speaks for its program on either side, between two barriers of all its threads. In the words of PTX's
// memory model: the first barrier puts what every thread wrote before the fence of the one that speaks, in causality
// order. That fence and the atomic operation after it are a release pattern, the atomic operation that reads its value
// (of a counter: it or what others made of it) and the fence after that an acquire pattern, at the scope of the card:
// the two synchronise. The second barrier puts the reader's fence before what all its threads read. Causality order
// runs through all of these (it is cumulative), so that those see what these wrote. A fence before the writer's barrier
// or after the reader's would speak for its own thread alone: nothing ties it to the atomic operation of another.
//
// What is read so may be copied asynchronously too: cp.async reads in the generic proxy, and is issued after the
// barrier. Loads through the read-only cache (ld.global.nc) would not do; no kernel has any, since no pointer is
// __restrict__.
#pragma once

#include <cstdint>

namespace loradash::cuda {

// Publishes what all threads wrote before the last barrier, adds one to a counter, and returns what it was: whoever
// takes the last number may, after the next barrier, read what all others published. One thread calls it.
__device__ __forceinline__ int32_t arrive(int32_t* counter) {
  __threadfence();
  const int32_t before = atomicAdd(counter, 1);
  __threadfence();
  return before;
}

// Publishes what all threads wrote before the last barrier, and says so. One thread calls it.
__device__ __forceinline__ void release(int32_t* flag) {
  __threadfence();
  atomicExch(flag, 1);
}

// Waits until a flag is released; all threads may read what was published after the next barrier. One thread calls it.
__device__ __forceinline__ void await(int32_t* flag) {
  while (atomicAdd(flag, 0) == 0) __nanosleep(64);
  __threadfence();
}

}  // namespace loradash::cuda
