// Kernels whose traffic can be worked out by hand.
extern "C" __global__ void copy(const float4* a, float4* b) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  b[i] = a[i];
}
extern "C" __global__ void strided(const float* a, float* b) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  b[i] = a[i * 8];
}
extern "C" __global__ void conflict(float* b) {
  __shared__ float s[1024];
  for (int k = 0; k < 32; k++) s[k * 32 + threadIdx.x] = k;
  __syncwarp();
  b[threadIdx.x] = s[threadIdx.x * 32];
}
