// Running launches on a CUDA stream. Torch-free; only what includes CUDA's runtime uses it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "cuda/params.h"

namespace loradash::cuda {

const void* find_forward_kernel(const std::string& name);
const void* find_backward_kernel(const std::string& name);
std::vector<int> architectures();  // compiled for: 800, 860, ...

// Runs them in order. Returns an empty string, or what failed: kernel, grid, configuration and CUDA's own message.
std::string run(const std::vector<Launch>& launches, cudaStream_t stream);

}  // namespace loradash::cuda
