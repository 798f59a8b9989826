// Vectors of LORADASH_VECTOR_BYTES, for the files that are compiled once per instruction set (see kernels_impl.h).
#pragma once

#include <cstdint>

namespace loradash::cpu::LORADASH_ISA {
namespace {

constexpr int kVectorBytes = LORADASH_VECTOR_BYTES;
typedef float VecF __attribute__((vector_size(kVectorBytes), aligned(4)));
typedef uint64_t VecU __attribute__((vector_size(kVectorBytes)));
constexpr int kLanes = kVectorBytes / 4;

// Products of the low 32 bits of every 64-bit lane: the one multiplication that compilers do not find by themselves.
inline VecU multiply_low32(VecU a, VecU b) {
#if LORADASH_VECTOR_BYTES == 64
  return (VecU)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif LORADASH_VECTOR_BYTES == 32
  return (VecU)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecU)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline VecU xor3(VecU a, VecU b, VecU c) {
#if LORADASH_VECTOR_BYTES == 64
  return (VecU)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The high 32 bits of every 64-bit lane, moved to the low ones; what is above does not matter. A shuffle rather than a
// shift: shifts of 512 bits share their only port with half of the multiplications.
inline VecU high_word(VecU a) {
#if LORADASH_VECTOR_BYTES == 64
  return (VecU)_mm512_movehdup_ps((__m512)a);
#else
  return a >> 32;
#endif
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace loradash::cpu::LORADASH_ISA
