// Kernels that time the emulator: one that computes, one that works in shared memory.
extern "C" __global__ void alu(float* y, int n) {
  float a = threadIdx.x, b = 1.5f;
  int c = threadIdx.x;
  for (int i = 0; i < n; i++) {
    a = a * b + 0.25f;
    c = c * 7 + i;
    b = b - a * 1e-9f;
    c ^= c >> 3;
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = a + b + c;
}
extern "C" __global__ void sgemm(const float* A, const float* B, float* C, int n) {
  __shared__ float s[16][16], t[16][17];
  int x = threadIdx.x, y = threadIdx.y, r = blockIdx.y * 16 + y, c = blockIdx.x * 16 + x;
  float v = 0;
  for (int k = 0; k < n; k += 16) {
    s[y][x] = A[r * n + k + x];
    t[y][x] = B[(k + y) * n + c];
    __syncthreads();
    for (int j = 0; j < 16; j++) v += s[y][j] * t[j][x];
    __syncthreads();
  }
  C[r * n + c] = v;
}
