// Parameters and entry points of the fused LoRA-Dash linear layer. No Torch here: raw pointers, sizes and strides.
//
// Letters as in the documentation: M tokens, K in_features, N out_features, r LoRA rank, s directions, R = r + s.
//   D = [A; Vt] (R, K)    Q = [B | U] (N, R)    c = [scaling * 1_r ; dash_sigma] (R)
#pragma once

#include <cstdint>

namespace loradash {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Philox4x32-10 dropout: element (m, k) of x takes half-word k % 8 of the block with counter
// (k / 8, m, offset_lo, offset_hi) and key (seed_lo, seed_hi); it is dropped when that half-word is below `threshold`.
struct Dropout {
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;  // round(p * 65536); 0 switches dropout off

  bool active() const { return threshold != 0; }
  float keep_scale() const { return 65536.0f / static_cast<float>(65536 - threshold); }
};

// The trainable and frozen low-rank operands, all fp32 and row-major.
struct Adapters {
  const float* lora_a;      // (r, K)
  const float* lora_b;      // (N, r)
  const float* dash_u;      // (N, s)
  const float* dash_vt;     // (s, K)
  const float* dash_sigma;  // (s)
  int64_t rank;             // r
  int64_t directions;       // s
  float scaling;

  int64_t width() const { return rank + directions; }
};

struct Shape {
  int64_t m, k, n;
};

// y = x W^T + b + (dropout(x) D^T * c) Q^T, and P = dropout(x) D^T, unscaled.
struct ForwardParams {
  Shape shape;
  Adapters adapters;
  Dropout dropout;
  DType dtype;    // of x, base and y
  const void* x;  // (M, K), row stride ldx
  int64_t ldx;
  const void* packed;  // pack_weight(.., kForward), or null: the base product is already in `base`
  const float* bias;   // (N) or null; only with `packed`
  const void* base;    // (M, N) contiguous or null; may equal y
  void* y;             // (M, N) contiguous
  float* p;            // (M, R)
};

// dx = dy W + mask * (G * c) D / (1 - p), dA, dB, d(dash_sigma), db; null outputs are not computed.
struct BackwardParams {
  Shape shape;
  Adapters adapters;
  Dropout dropout;
  DType dtype;     // of x, dy, base and dx
  const void* dy;  // (M, N), row stride lddy
  int64_t lddy;
  const void* x;  // (M, K), row stride ldx
  int64_t ldx;
  const void* packed;  // pack_weight(.., kBackward), or null: dy W is already in `base`, or there is none
  const void* base;    // (M, K) contiguous or null; may equal dx
  const float* p;      // (M, R), from the forward pass
  void* dx;            // (M, K) contiguous
  float* da;           // (r, K)
  float* db_lora;      // (N, r)
  float* dsigma;       // (s)
  float* dbias;        // (N)
};

// The caller's thread pool: run(context, count, body, body_context) calls body for every index in [0, count).
struct ThreadPool {
  int threads;
  void (*run)(int64_t count, void (*body)(void*, int64_t), void* body_context);
};

enum class Direction { kForward, kBackward };

namespace cpu {

// From how many rows on this CPU runs the base product of `dtype` inside our kernels; 0: never. Where it does not, the
// caller computes it with a library.
int64_t min_base_rows(DType dtype);
// The instruction set in use: "amx", "avx512_bf16", "avx512", "avx2" or "portable". LORADASH_CPU_ISA lowers it.
const char* isa_name(DType dtype);

// Bytes of the packed weight and the packing itself. `w` is (N, K) with any strides.
int64_t packed_bytes(DType dtype, Direction direction, int64_t n, int64_t k);
void pack_weight(DType dtype, Direction direction, const void* w, int64_t stride_n, int64_t stride_k, int64_t n,
                 int64_t k, void* packed, const ThreadPool& pool);

// A matrix as it lies in memory: runs of `bytes` without gaps, `pitch` bytes apart.
struct Runs {
  const void* data;
  int64_t count, bytes, pitch;
};

// The fingerprint of a matrix: 16 bytes for every 8 KB of a run. Of two matrices of the same runs that differ anywhere,
// every block that differs has the same fingerprint with a probability of at most 2^-64, over keys that are drawn once
// per process: whatever was changed, moved or cancels out in a sum.
int64_t fingerprint_words(const Runs& runs);
void fingerprint(const Runs& runs, uint64_t* out, const ThreadPool& pool);

void forward(const ForwardParams& params, const ThreadPool& pool);
void backward(const BackwardParams& params, const ThreadPool& pool);

// keep[m * k_size + k] = 1 where the dropout of (m, k) keeps the element: the mask the kernels regenerate.
void dropout_mask(const Dropout& dropout, int64_t m, int64_t k, uint8_t* keep);

}  // namespace cpu
}  // namespace loradash
