// What a call of the fused LoRA-Dash linear layer is about, in the words that the CPU and the CUDA code share. No Torch
// here: raw pointers, sizes and strides.
//
// Letters as in the documentation: M tokens, K in_features, N out_features, r LoRA rank, s directions, R = r + s.
//   D = [A; Vt] (R, K)    Q = [B | U] (N, R)    c = [scaling * 1_r ; dash_sigma] (R)
#pragma once

#include <cstdint>

namespace loradash {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Pass { kForward, kBackward };

struct Shape {
  int64_t m, k, n;
};

// The trainable and frozen low-rank operands, row-major and without gaps. Matrix is how code of a device holds one.
template <typename Matrix>
struct Adapters {
  Matrix lora_a;            // (r, K)
  Matrix lora_b;            // (N, r)
  Matrix dash_u;            // (N, s)
  Matrix dash_vt;           // (s, K)
  const float* dash_sigma;  // (s)
  int64_t rank;             // r
  int64_t directions;       // s
  float scaling;

  int64_t width() const { return rank + directions; }
};

// Dropout is Philox4x32-10: element (m, k) of x takes half-word k % 8 of the block with counter
// (k / 8, m, offset_lo, offset_hi) and key (seed_lo, seed_hi); it is dropped when that half-word is below a threshold,
// round(p * 65536). A threshold of 0 switches dropout off. What is kept is scaled by this:
inline float keep_scale(uint32_t threshold) { return 65536.0f / static_cast<float>(65536 - threshold); }

}  // namespace loradash
