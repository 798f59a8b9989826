// Each kernel has a fault, or a switch that plants one.
#include <cuda_pipeline_primitives.h>
#define K extern "C" __global__ void
K oob(float* x, int n) { x[threadIdx.x + n] = 1; }
K oob_read(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x - 1]; }
K oob_shared(float* y, int i) {
  __shared__ float s[64];
  s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + i];
}
K misaligned(const char* x, float4* y, int off) { y[threadIdx.x] = *(const float4*)(x + off + threadIdx.x * 16); }
K null(float* x) { *x = 1; }
K no_sync(const float* x, float* y, int sync) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  if (sync) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}
K write_after_read(const float* x, float* y, int sync) {
  __shared__ float s[128];
  float r = 0;
  for (int k = 0; k < 4; k++) {
    s[threadIdx.x] = x[threadIdx.x] * k;
    __syncthreads();
    r += s[127 - threadIdx.x];
    if (sync) __syncthreads();
  }
  y[threadIdx.x] = r;
}
K cp_async(const float4* x, float4* y, int wait) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  if (wait == 1) __pipeline_wait_prior(0);
  if (wait == 2) __pipeline_wait_prior(1);
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
K cp_async_no_sync(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[threadIdx.x] = s[63 - threadIdx.x];
}
K cp_async_overwrite(const float4* x, float4* y) {
  __shared__ float4 s[64];
  float4 r;
  for (int k = 0; k < 2; k++) {
    __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    r = s[63 - threadIdx.x];
    y[threadIdx.x + 64 * k] = r;
  }
}
K uninit(float* y, int n) {
  __shared__ float s[64];
  if (threadIdx.x < n) s[threadIdx.x] = 2;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
K deadlock(float* y) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
  *y = 1;
}
K divergent_barrier(float* y) {
  if (threadIdx.x % 2) {
    __syncthreads();
    y[0] = 1;
  } else {
    y[1] = 2;
    __syncthreads();
    y[2] = 3;
  }
}
K spin(volatile int* flag, int* y) {
  while (*flag == 0) {
  }
  *y = 1;
}
K next(int* flags) {
  if (threadIdx.x == 0) {
    while (blockIdx.x + 1 < gridDim.x && atomicAdd(&flags[blockIdx.x + 1], 0) == 0) {
    }
    atomicExch(&flags[blockIdx.x], 1);
  }
}
K same_word(int* y, int other) {
  __shared__ int s;
  s = 5 + (threadIdx.x >= 32) * other;
  __syncthreads();
  y[threadIdx.x] = s;
}
K trap(int* y) {
  if (threadIdx.x == 5) __trap();
}
K global_race(int* y, int atomic) {
  if (threadIdx.x == 0) {
    if (atomic)
      atomicAdd(y, 1);
    else
      *y = blockIdx.x;
  }
}
K bad_mask(int* y, unsigned mask) { y[threadIdx.x] = __shfl_sync(mask, threadIdx.x, 3); }
