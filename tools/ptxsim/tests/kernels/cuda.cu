// Kernels that nvcc compiles and numpy checks, each for one part of CUDA.
#include <assert.h>
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <stdio.h>

#include <cuda/atomic>
namespace cg = cooperative_groups;
#define K extern "C" __global__ void

K transpose(const float* in, float* out, int n) {
  __shared__ float t[32][33];
  int x = blockIdx.x * 32 + threadIdx.x, y = blockIdx.y * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) t[threadIdx.y + j][threadIdx.x] = in[(y + j) * n + x];
  __syncthreads();
  x = blockIdx.y * 32 + threadIdx.x;
  y = blockIdx.x * 32 + threadIdx.y;
  for (int j = 0; j < 32; j += 8) out[(y + j) * n + x] = t[threadIdx.x][threadIdx.y + j];
}
K histogram(const unsigned char* in, unsigned* out, int n) {
  __shared__ unsigned h[256];
  h[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&h[in[i]], 1u);
  __syncthreads();
  atomicAdd(&out[threadIdx.x], h[threadIdx.x]);
}
// scan makes the inclusive sums of 1024 numbers with shuffles.
K scan(int* data) {
  __shared__ int sums[32];
  int lane = threadIdx.x & 31, w = threadIdx.x >> 5, v = data[threadIdx.x];
  for (int d = 1; d < 32; d *= 2) {
    int u = __shfl_up_sync(~0u, v, d);
    if (lane >= d) v += u;
  }
  if (lane == 31) sums[w] = v;
  __syncthreads();
  if (w == 0) {
    int s = sums[lane];
    for (int d = 1; d < 32; d *= 2) {
      int u = __shfl_up_sync(~0u, s, d);
      if (lane >= d) s += u;
    }
    sums[lane] = s;
  }
  __syncthreads();
  data[threadIdx.x] = v + (w ? sums[w - 1] : 0);
}
__device__ __noinline__ int collatz(int n) {
  int c = 0;
  while (n != 1) {
    n = n & 1 ? 3 * n + 1 : n / 2;
    c++;
  }
  return c;
}
K divergent(int* out) {
  int i = threadIdx.x;
  int r = i % 3 == 0 ? collatz(i + 1) : i % 3 == 1 ? -collatz(2 * i + 1) : i;
  out[i] = r;
}
K table(const int* op, const float* x, float* y) {
  int i = threadIdx.x;
  float v = x[i];
  switch (op[i]) {
    case 0:
      v = v + 1;
      break;
    case 1:
      v = v * v;
      break;
    case 2:
      v = -v;
      break;
    case 3:
      v = sqrtf(fabsf(v));
      break;
    case 4:
      v = 1 / v;
      break;
    case 5:
      v = floorf(v);
      break;
    case 6:
      v = v > 0 ? 3.f : -3.f;
      break;
    default:
      v = 0;
  }
  y[i] = v;
}
K local_array(const int* idx, int* out) {
  int a[16];
  for (int k = 0; k < 16; k++) a[k] = k * k + threadIdx.x;
  int s = 0;
  for (int k = 0; k < 8; k++) {
    a[idx[threadIdx.x * 8 + k]] += k;
    s += a[idx[k]];
  }
  out[threadIdx.x] = s;
}
struct P {
  int n;
  float scale;
  const float* in;
  float* out;
  char tag[3];
  double bias;
};
K by_struct(P p) {
  int i = threadIdx.x;
  if (i < p.n) p.out[i] = p.in[i] * p.scale + (float)p.bias + p.tag[i % 3];
}
__constant__ float coef[4] = {1.f, -2.f, 0.5f, 3.f};
__device__ int counter = 5;
K constants(float* out) {
  float x = threadIdx.x * 0.1f, r = 0;
  for (int k = 3; k >= 0; k--) r = r * x + coef[k];
  out[threadIdx.x] = r;
  if (threadIdx.x == 0) counter += 2;
}
K halves(const __half2* a, const __half2* b, __half2* c, const __nv_bfloat162* d, __nv_bfloat162* e) {
  int i = threadIdx.x;
  c[i] = __hfma2(a[i], b[i], __hmax2(a[i], b[i]));
  e[i] = __hmul2(d[i], __hadd2(d[i], d[i]));
}
K doubles(const double* a, double* b) {
  int i = threadIdx.x;
  b[i] = exp(a[i]) + log(fabs(a[i]) + 1) * sin(a[i]) / cbrt(a[i] + 20);
}
K math(const float* a, float* b) {
  int i = threadIdx.x;
  b[i] = expf(a[i]) + logf(fabsf(a[i]) + 1) * sinf(a[i] * 100) + powf(fabsf(a[i]), 1.7f) + erff(a[i]) +
         fmodf(a[i] * 50, 3.f);
}
K warps(const int* a, int* out) {
  auto tile = cg::tiled_partition<8>(cg::this_thread_block());
  int v = a[threadIdx.x];
  int s = cg::reduce(tile, v, cg::plus<int>());
  unsigned b = __ballot_sync(~0u, v & 1);
  int any = __any_sync(~0u, v == 7);
  unsigned mm = __match_any_sync(~0u, v & 3);
  int mx = 0;
  if (threadIdx.x & 1) mx = __reduce_max_sync(__activemask(), v);
  out[threadIdx.x] = s + __popc(b) * 1000 + any * 100000 + __popc(mm) * 1000000 + mx * 10;
}
// pipeline has two buffers that cp.async fills in turn.
K pipeline(const float4* in, float4* out, int tiles) {
  __shared__ float4 buf[2][128];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&buf[0][t], &in[t], 16);
  __pipeline_commit();
  for (int k = 0; k < tiles; k++) {
    if (k + 1 < tiles) __pipeline_memcpy_async(&buf[(k + 1) & 1][t], &in[(k + 1) * 128 + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float4 v = buf[k & 1][127 - t];
    out[k * 128 + t] = make_float4(v.w, v.z, v.y, v.x);
    __syncthreads();
  }
}
// In chain, each persistent CTA waits for its predecessor through global memory.
K chain(int* flags, int* data) {
  if (threadIdx.x == 0) {
    cuda::atomic_ref<int, cuda::thread_scope_device> mine(flags[blockIdx.x + 1]), prev(flags[blockIdx.x]);
    while (prev.load(cuda::memory_order_acquire) == 0) __nanosleep(20);
    data[blockIdx.x + 1] = data[blockIdx.x] * 3 + 1;
    mine.store(1, cuda::memory_order_release);
  }
}
// In spinlock, every thread of a warp takes a lock, which needs fair scheduling inside the warp.
K spinlock(int* lock, int* value) {
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      *(volatile int*)value += 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}
K atomics(int* i, unsigned* u, float* f, double* d, __half2* h, unsigned long long* q) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&i[0], t);
  atomicMin(&i[1], -t);
  atomicMax(&i[2], t);
  atomicXor(&i[3], t);
  atomicOr(&i[4], 1 << (t & 31));
  atomicSub(&i[5], 1);
  atomicInc(&u[0], 9);
  atomicDec(&u[1], 9);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  atomicMax(q, (unsigned long long)t << 33);
}
K print(int x) {
  if (threadIdx.x < 2) printf("t%d x=%d %s %.2f %lld\n", threadIdx.x, x, "str", 1.5, 1ll << 40);
}
K assertion(int x) { assert(x < 10); }
// In named, a producer and a consumer warp meet at named barriers.
K named(int* out) {
  __shared__ int s[64];
  int t = threadIdx.x;
  if (t < 32) {
    for (int r = 0; r < 4; r++) {
      asm volatile("bar.sync 2, 64;");
      s[t] = r * 100 + t;
      asm volatile("bar.arrive 1, 64;");
    }
  } else {
    for (int r = 0; r < 4; r++) {
      asm volatile("bar.arrive 2, 64;");
      asm volatile("bar.sync 1, 64;");
      out[r * 32 + t - 32] = s[t - 32];
    }
  }
}
K vote_barrier(const int* a, int* out) {
  int c = __syncthreads_count(a[threadIdx.x] > 0), o = __syncthreads_or(a[threadIdx.x] == 5),
      n = __syncthreads_and(a[threadIdx.x] < 100);
  out[threadIdx.x] = c * 4 + o * 2 + n;
}
K generic(float* g, int pick) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float* p = pick ? s : g;
  float v = p[31 - threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = v * 2;
  __syncthreads();
  if (pick) g[threadIdx.x] = s[threadIdx.x];
}
K bytes(const signed char* a, const unsigned short* b, long long* c) {
  int i = threadIdx.x;
  c[i] = (long long)a[i] * b[i] - __dp4a((int)a[i] * 0x01010101, 0x01020304, 7);
}
