#include "planted.h"

namespace check {
namespace {

__global__ void race(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 32) % 64];
}

// The card counts arrivals, at whichever barrier: the kernel ends. (Threads that return instead of arriving would be no
// fault: from sm_70 on nobody waits for them.)
__global__ void sync(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

void launch(void (*kernel)(int*)) {
  int* out = nullptr;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return;
  kernel<<<1, 64>>>(out);
  (void)cudaDeviceSynchronize();
  (void)cudaFree(out);
}

}  // namespace

void plant_race() { launch(race); }
void plant_sync() { launch(sync); }

}  // namespace check
