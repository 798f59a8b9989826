// Parameters and entry points of the CPU kernels. The letters are those of problem.h.
#pragma once

#include "problem.h"

namespace loradash::cpu {

struct Dropout {
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;
  // x begins at this row, and at this block of kPhiloxElements columns, of the matrix whose mask is drawn.
  uint32_t first_row = 0, first_block = 0;

  bool active() const { return threshold != 0; }
  float keep_scale() const { return loradash::keep_scale(threshold); }
};

using Fp32Adapters = Adapters<const float*>;

// One layer of a call. A call has one, or several that read the same x under one mask.
struct ForwardMember {
  int64_t n;
  Fp32Adapters adapters;
  // This is what pack_weight made for the forward pass, or null: then the base product is already in `base`.
  const void* packed;
  // The bias is null, or (N); it is added only where the weight is packed.
  const float* bias;
  // The base is null, or (M, N) contiguous; it may be y itself.
  const void* base;
  void* y;  // (M, N)
};

// The forward pass computes y = x W^T + b + (dropout(x) D^T * c) Q^T of every member, and P = dropout(x) D^T, unscaled,
// of D stacked from all of them: R is the sum of their widths, their columns of P lie side by side.
struct ForwardParams {
  int64_t m, k;
  Dropout dropout;
  // x, base and y have this dtype.
  DType dtype;
  const void* x;  // (M, K), row stride ldx
  int64_t ldx;
  const ForwardMember* members;
  int64_t count;
  float* p;  // (M, R)
};

struct BackwardMember {
  int64_t n;
  Fp32Adapters adapters;
  const void* dy;  // (M, N), row stride lddy
  int64_t lddy;
  // This is what pack_weight made for the backward pass, or null: then dy W is already in `base`, or there is none.
  const void* packed;
  float* da;       // (r, K)
  float* db_lora;  // (N, r)
  float* dsigma;   // (s)
  float* dbias;    // (N)
};

// The backward pass computes dx = sum of dy W + mask * (G * c) D / (1 - p) over the members, and dA, dB, d(dash_sigma)
// and db of each, except where the output is null.
struct BackwardParams {
  int64_t m, k;
  Dropout dropout;
  // x, dy, base and dx have this dtype.
  DType dtype;
  const void* x;  // (M, K), row stride ldx
  int64_t ldx;
  const BackwardMember* members;
  int64_t count;
  // The base is null, or (M, K) contiguous; it may be dx itself.
  const void* base;
  // The forward pass returned this P.
  const float* p;  // (M, R)
  void* dx;        // (M, K)
};

// The caller's thread pool: `run` calls body(body_context, index) for every index in [0, count).
struct ThreadPool {
  int threads;
  void (*run)(int64_t count, void (*body)(void*, int64_t), void* body_context);
};

void forward(const ForwardParams& params, const ThreadPool& pool);
void backward(const BackwardParams& params, const ThreadPool& pool);

// The mask the kernels regenerate: keep[m * k_size + k] is 1 where dropout keeps element (m, k), else 0.
void dropout_mask(const Dropout& dropout, int64_t m, int64_t k, uint8_t* keep);

// From how many rows on this CPU runs the base product of `dtype` inside our kernels; 0: never. Where it does not, the
// caller computes it with a library.
int64_t min_base_rows(DType dtype);
// The instruction set in use: "amx", "avx512_bf16", "avx512", "avx2" or "portable". LORADASH_CPU_ISA lowers it.
const char* isa_name(DType dtype);

// Bytes of the packed weight, and the packing itself. `w` is (N, K) with any strides.
int64_t packed_bytes(DType dtype, Pass pass, int64_t n, int64_t k);
void pack_weight(DType dtype, Pass pass, const void* w, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                 void* packed, const ThreadPool& pool);

// A matrix as it lies in memory: runs of `bytes` without gaps, `pitch` bytes apart.
struct Runs {
  const void* data;
  int64_t count, bytes, pitch;
};

// The fingerprint of a matrix: 16 bytes for every 8 KB of a run. Where two matrices of the same runs differ, every
// block that differs has the same fingerprint with a probability of at most 2^-64, over keys that are drawn once per
// process: whatever was changed, moved or cancels out in a sum.
int64_t fingerprint_words(const Runs& runs);
void fingerprint(const Runs& runs, uint64_t* out, const ThreadPool& pool);

}  // namespace loradash::cpu
