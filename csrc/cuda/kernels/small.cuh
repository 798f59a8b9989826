// What is small beside the large operands: packing the low-rank ones, and the second stage of the sums over M.
#pragma once

#include "cuda/params.h"
#include "element.cuh"
#include "problem.h"

namespace loradash::cuda {

__device__ __forceinline__ float adapter_value(const void* data, int32_t dtype, int64_t index) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

// These return element (rank, i) of D = [A; Vt], i < K, and of Q^T = [B | U]^T, i < N.
__device__ __forceinline__ float d_value(const PackParams& p, int rank, int64_t i) {
  if (i >= p.k) return 0.0f;
  if (rank < p.rank) return adapter_value(p.lora_a, p.adapter_dtype[kLoraA], rank * p.k + i);
  if (rank < p.rank + p.directions)
    return adapter_value(p.dash_vt, p.adapter_dtype[kDashVt], (rank - p.rank) * p.k + i);
  return 0.0f;
}
__device__ __forceinline__ float q_value(const PackParams& p, int rank, int64_t i) {
  if (i >= p.n) return 0.0f;
  if (rank < p.rank) return adapter_value(p.lora_b, p.adapter_dtype[kLoraB], i * p.rank + rank);
  if (rank < p.rank + p.directions)
    return adapter_value(p.dash_u, p.adapter_dtype[kDashU], i * p.directions + rank - p.rank);
  return 0.0f;
}

// Calls f(row, column) for every step-th element of a matrix, from the first on: all threads together for each. Rows
// and columns go along, for 64-bit divisions, one an element, would cost more than all else, and spill.
template <typename F>
__device__ __forceinline__ void each_element(int64_t rows, int64_t columns, const F& f) {
  if (columns == 0) return;
  const uint32_t width = static_cast<uint32_t>(columns);
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const uint32_t down = step / width, right = step % width;
  int64_t row = first / width;
  uint32_t column = first % width;
  while (row < rows) {
    f(row, column);
    row += down, column += right;
    if (column >= width) column -= width, ++row;
  }
}

// All threads write one form after the other, and read the adapters once for each. A form of D takes 2 width K bytes,
// one of Q 2 width N; the only one that grows with M is p_low, 2 M p_width.
template <typename T>
__device__ __forceinline__ void pack(const PackParams& p) {
  const auto put = [](void* out, int64_t rows, int64_t columns, const auto& value) {
    if (!out) return;
    each_element(rows, columns, [&](int64_t row, uint32_t column) {
      static_cast<T*>(out)[row * columns + column] = Element<T>::from_float(value(row, column));
    });
  };
  put(p.d_rows, p.width, p.ldd, [&](int64_t rank, uint32_t i) { return d_value(p, static_cast<int>(rank), i); });
  put(p.d_columns, p.k, p.width, [&](int64_t i, uint32_t rank) { return d_value(p, static_cast<int>(rank), i); });
  put(p.q_rows, p.width, p.ldq, [&](int64_t rank, uint32_t i) { return q_value(p, static_cast<int>(rank), i); });
  put(p.q_columns, p.n, p.width, [&](int64_t i, uint32_t rank) { return q_value(p, static_cast<int>(rank), i); });
  put(p.p_low, p.m, p.p_width, [&](int64_t row, uint32_t column) {
    const int low = static_cast<int>(column), all = p.rank + p.directions;
    return low < p.rank ? p.p[row * all + low] : low == p.rank ? 1.0f : 0.0f;
  });
  each_element(1, p.counter_count, [&](int64_t, uint32_t i) { p.counters[i] = 0; });
}

// Reads every partial sum once, in the order of the splits. dy_parts holds the rows of dB, then db.
__device__ __forceinline__ void finish(const FinishParams& p) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x,
                step = gridDim.x * static_cast<int64_t>(blockDim.x);
  const auto total = [](const float* parts, int64_t index, int64_t size, int splits) {
    float sum = 0.0f;
    for (int s = 0; s < splits; ++s) sum += parts[s * size + index];
    return sum;
  };
  if (p.da) {
    const int64_t size = p.rank * p.k;
    for (int64_t i = first; i < size; i += step) p.da[i] = p.scale_a * total(p.da_parts, i, size, p.splits_x);
  }
  const int64_t size = p.dy_columns * p.n;
  if (p.db_lora) {
    for (int64_t i = first; i < p.rank * p.n; i += step) {
      p.db_lora[i % p.n * p.rank + i / p.n] = p.scale_b * total(p.dy_parts, i, size, p.splits_y);
    }
  }
  if (p.dbias) {
    for (int64_t i = first; i < p.n; i += step) p.dbias[i] = total(p.dy_parts, p.rank * p.n + i, size, p.splits_y);
  }
  if (p.dsigma) {
    for (int64_t i = first; i < p.directions; i += step)
      p.dsigma[i] = total(p.dsigma_parts, i, p.directions, p.sigma_blocks);
  }
}

}  // namespace loradash::cuda
