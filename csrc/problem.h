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

// Dropout is Philox4x32-10 (Salmon et al., SC 2011): element (m, k) of x takes half-word k % 8 of the block with
// counter (k / 8, m, offset_lo, offset_hi) and key (seed_lo, seed_hi); it is dropped when that half-word is below a
// threshold, round(p * 65536). A threshold of 0 switches dropout off. Where x is a window of a larger matrix, the mask
// is that of the latter, and m and k are places in it; x begins at a multiple of 8 columns.
//
// Every round multiplies two words of the counter by M0 and M1, and adds W0 and W1 to the two words of the key.
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
// One block of 128 bits serves 8 neighbours in k, 16 bits each.
constexpr int kPhiloxElements = 8;

// Returns the factor of what dropout keeps.
inline float keep_scale(uint32_t threshold) { return 65536.0f / static_cast<float>(65536 - threshold); }

}  // namespace loradash
