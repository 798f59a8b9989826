// What the bindings of the CPU kernels share: Torch's dtypes and Torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include "bindings/calls.h"
#include "cpu/cpu.h"

namespace loradash::cpu {

inline DType dtype_of(const Tensor& t) {
  return loradash::dtype_of(t, "CPU kernels take float32, bfloat16 or float16");
}

inline ThreadPool thread_pool() {
  return {at::get_num_threads(), [](int64_t count, void (*body)(void*, int64_t), void* context) {
            at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

}  // namespace loradash::cpu
