#include "cuda/launch.h"

#include <sstream>

namespace loradash::cuda {

std::string run(const std::vector<Launch>& launches, cudaStream_t stream) {
  for (const Launch& launch : launches) {
    const auto failed = [&](const char* what) {
      (void)cudaGetLastError();  // the message tells it; the next call of somebody else must not
      std::ostringstream text;
      text << "kernel " << launch.kernel << " (grid " << launch.grid[0] << " x " << launch.grid[1] << " x "
           << launch.grid[2] << ", " << launch.threads << " threads, " << launch.shared_bytes
           << " bytes of shared memory): " << what;
      return text.str();
    };
    const void* kernel = find_forward_kernel(launch.kernel);
    if (!kernel) kernel = find_backward_kernel(launch.kernel);
    if (!kernel) return failed("it is not in this build");
    constexpr uint32_t kWithoutAsking = 48 * 1024;  // more shared memory must be asked for, per device
    cudaError_t error = cudaSuccess;
    if (launch.shared_bytes > kWithoutAsking) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(launch.shared_bytes));
    }
    if (error == cudaSuccess) {
      void* arguments[] = {const_cast<unsigned char*>(launch.params.data())};
      error = cudaLaunchKernel(kernel, dim3(launch.grid[0], launch.grid[1], launch.grid[2]), dim3(launch.threads),
                               arguments, launch.shared_bytes, stream);
    }
    if (error != cudaSuccess) return failed(cudaGetErrorString(error));
  }
  return "";
}

}  // namespace loradash::cuda
