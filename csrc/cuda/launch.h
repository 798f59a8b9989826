// Running launches on a CUDA stream. No Torch here; only what includes CUDA's runtime uses it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>
#include <vector>

#include "cuda/params.h"

namespace loradash::cuda {

// Kernels by the names of their entry points, as the .cu files define them.
using KernelTable = std::vector<std::pair<const char*, const void*>>;
KernelTable forward_kernels();
KernelTable backward_kernels();

// Null where this build has no such kernel.
const void* find_kernel(const std::string& name);

// Does this error say that the build has no code for a card, or only PTX that is newer than its driver? Any other says
// that the card could not be asked.
constexpr bool says_no_code(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion;
}

// What the kernels are compiled for: 800, 860, ...
std::vector<int> architectures();

// Runs them in order. Returns an empty string, or what failed: kernel, grid, configuration and CUDA's own message.
std::string run(const std::vector<KernelLaunch>& launches, cudaStream_t stream);

}  // namespace loradash::cuda
