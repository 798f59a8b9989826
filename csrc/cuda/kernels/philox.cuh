// Dropout: one call of Philox4x32-10 (Salmon et al., SC 2011) draws the keep bits of eight neighbours in k, the same
// bits as on the CPU: counter (k / 8, m, offset), key seed, half-word k % 8 against a 16-bit threshold.
#pragma once

#include <cstdint>

#include "problem.h"

namespace loradash::cuda {

// Gives the high and the low half of a product, in one instruction.
__device__ __forceinline__ void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  asm("{ .reg .u64 t; mul.wide.u32 t, %2, %3; mov.b64 {%1, %0}, t; }" : "=r"(high), "=r"(low) : "r"(a), "r"(b));
}
__device__ __forceinline__ uint32_t xor_three(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The rounds whose inputs depend on k alone or on m alone cost nothing per element where rows or columns are reused:
// with the counter words in this order, 15 of the 20 products are left. (The CPU's csrc/cpu/philox.h divides them the
// same way.)
struct PhiloxColumn {
  uint32_t a, b, c, d;
};
struct PhiloxRow {
  uint32_t high, low;
};

struct Dropout16 {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
  // These are the halves of M1 times the low offset, and the high offset.
  uint32_t offset_high, offset_low, offset1;
  // The threshold is kept in two parts: its lower 15 bits, in both halves of a word, and whether bit 15 is set.
  uint32_t low_threshold, high_bit;
  // Places are counted from here on.
  uint32_t first_row, first_block;
  bool active;

  // `params` of a kernel: its seed, window and threshold.
  template <typename Params>
  __device__ __forceinline__ explicit Dropout16(const Params& params) : active(params.seed && params.threshold) {
    const int64_t *seed = params.seed, *window = params.window;
    const uint32_t threshold = params.threshold;
    first_row = active && window ? static_cast<uint32_t>(window[0]) : 0;
    first_block = active && window ? static_cast<uint32_t>(window[1] / kPhiloxElements) : 0;
    const uint64_t key = active ? static_cast<uint64_t>(seed[0]) : 0,
                   offset = active ? static_cast<uint64_t>(seed[1]) : 0;
#pragma unroll
    for (uint32_t i = 0; i < kPhiloxRounds; ++i) {
      key0[i] = static_cast<uint32_t>(key) + i * kPhiloxW0;
      key1[i] = static_cast<uint32_t>(key >> 32) + i * kPhiloxW1;
    }
    multiply_wide(kPhiloxM1, static_cast<uint32_t>(offset), offset_high, offset_low);
    offset1 = static_cast<uint32_t>(offset >> 32);
    low_threshold = (threshold & 0x7FFF) * 0x00010001u;
    high_bit = threshold >> 15 & 1;
  }

  __device__ __forceinline__ PhiloxColumn column(uint32_t block) const {
    uint32_t high, low, second_high, second_low, third_high, third_low;
    multiply_wide(kPhiloxM0, first_block + block, high, low);
    multiply_wide(kPhiloxM1, xor_three(high, offset1, key1[0]), second_high, second_low);
    multiply_wide(kPhiloxM0, xor_three(second_high, offset_low, key0[1]), third_high, third_low);
    return {low ^ key1[1], second_low ^ key0[2], third_high ^ key1[2], third_low};
  }
  __device__ __forceinline__ PhiloxRow row(uint32_t m) const {
    PhiloxRow r;
    multiply_wide(kPhiloxM0, xor_three(offset_high, first_row + m, key0[0]), r.high, r.low);
    return r;
  }

  // Returns masks of two elements a word: 0xFFFF where an element is kept, in the order of the elements.
  __device__ __forceinline__ uint4 masks(const PhiloxRow& r, const PhiloxColumn& k) const {
    uint32_t c0, c1, c2 = r.low ^ k.c, c3 = k.d;
    multiply_wide(kPhiloxM1, r.high ^ k.a, c0, c1);
    c0 ^= k.b;
#pragma unroll
    for (int round = 3; round < kPhiloxRounds; ++round) {
      uint32_t high, low, other_high, other_low;
      multiply_wide(kPhiloxM0, c0, high, low);
      multiply_wide(kPhiloxM1, c2, other_high, other_low);
      c0 = xor_three(other_high, c1, key0[round]), c1 = other_low;
      c2 = xor_three(high, c3, key1[round]), c3 = low;
    }
    return make_uint4(kept(c0), kept(c1), kept(c2), kept(c3));
  }

 private:
  // Compares both halves of a word with the threshold. With bit 15 set beforehand, a difference of the lower bits
  // borrows from no neighbour, and keeps bit 15 where they are at least the threshold's; prmt spreads bit 15 over its
  // half.
  __device__ __forceinline__ uint32_t kept(uint32_t word) const {
    const uint32_t lower = (word | 0x80008000u) - low_threshold;
    const uint32_t sign = high_bit ? word & lower : word | lower;
    uint32_t mask;
    asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"(sign));
    return mask;
  }
};

}  // namespace loradash::cuda
