// A CUDA runtime without a card, for examples/cuda_check: memory and launches are whoever's that this is told of.
// Linked in place of the runtime and of the compiled kernels.
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda_check/planted.h"

namespace {

// These return null, and not 0, where they fail.
using Allocate = void* (*)(size_t bytes);
using Free = void (*)(void* data);
using Launch = int (*)(const char* kernel, const unsigned* grid, unsigned threads, unsigned shared, const void* params,
                       size_t bytes);

Allocate allocate = nullptr;
Free give_back = nullptr;
Launch launch = nullptr;
int processors = 0, shared_limit = 0;
std::vector<std::string> kernels;

size_t params_bytes(const std::string& kernel) {
  using namespace loradash::cuda;
  if (kernel.find("one_launch") != std::string::npos) return sizeof(OneLaunchParams);
  if (kernel.starts_with("gemm_")) return sizeof(GemmParams);
  if (kernel.starts_with("pack_")) return sizeof(PackParams);
  return kernel == "finish_sums" ? sizeof(FinishParams) : sizeof(PassParams);
}

}  // namespace

extern "C" void pretend(Allocate allocates, Free frees, Launch launches, int number, int bytes, const char** names,
                        int count) {
  allocate = allocates, give_back = frees, launch = launches, processors = number, shared_limit = bytes;
  kernels.assign(names, names + count);
}

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = processors > 0;
  return processors > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? processors : shared_limit;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = allocate(bytes);
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* data) {
  if (data) give_back(data);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "a pretended error"; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments, size_t shared,
                             cudaStream_t) {
  const unsigned sizes[] = {grid.x, grid.y, grid.z};
  const char* name = static_cast<const char*>(kernel);
  const int failed = launch(name, sizes, threads.x, static_cast<unsigned>(shared), arguments[0], params_bytes(name));
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // extern "C"

namespace loradash::cuda {

KernelTable forward_kernels() {
  KernelTable table;
  for (const std::string& name : kernels) table.emplace_back(name.c_str(), name.c_str());
  return table;
}
KernelTable backward_kernels() { return {}; }

}  // namespace loradash::cuda

namespace check {

void plant_race() {}
void plant_sync() {}

}  // namespace check
