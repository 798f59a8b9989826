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

__global__ void sync(int* out) {
  if (threadIdx.x >= 16) return;
  __syncthreads();
  out[threadIdx.x] = 1;
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
