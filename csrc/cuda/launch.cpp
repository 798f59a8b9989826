#include "cuda/launch.h"

#include <sstream>
#include <unordered_map>

namespace loradash::cuda {
namespace {

cudaError_t start(const KernelLaunch& launch, const void* kernel, cudaStream_t stream) {
  // Up to here shared memory is free to take; more must be asked for, per device.
  constexpr uint32_t kWithoutAsking = 48 * 1024;
  if (launch.shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(launch.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<unsigned char*>(launch.params.data())};
  return cudaLaunchKernel(kernel, dim3(launch.grid[0], launch.grid[1], launch.grid[2]), dim3(launch.threads), arguments,
                          launch.shared_bytes, stream);
}

std::string failure(const KernelLaunch& launch, const char* what) {
  std::ostringstream text;
  text << "kernel " << launch.kernel << " (grid " << launch.grid[0] << " x " << launch.grid[1] << " x "
       << launch.grid[2] << ", " << launch.threads << " threads, " << launch.shared_bytes
       << " bytes of shared memory): " << what;
  return text.str();
}

}  // namespace

const void* find_kernel(const std::string& name) {
  static const std::unordered_map<std::string, const void*> kernels = [] {
    std::unordered_map<std::string, const void*> all;
    for (const KernelTable& table : {forward_kernels(), backward_kernels()}) all.insert(table.begin(), table.end());
    return all;
  }();
  const auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : found->second;
}

std::string run(const std::vector<KernelLaunch>& launches, cudaStream_t stream) {
  for (const KernelLaunch& launch : launches) {
    const void* kernel = find_kernel(launch.kernel);
    if (!kernel) return failure(launch, "it is not in this build");
    const cudaError_t error = start(launch, kernel, stream);
    if (error != cudaSuccess) {
      // Clears CUDA's last error: the message reports it, and the next call of other code must not report it again.
      (void)cudaGetLastError();
      return failure(launch, cudaGetErrorString(error));
    }
  }
  return "";
}

}  // namespace loradash::cuda
