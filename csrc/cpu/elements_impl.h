// Element types: from memory to fp32 and back, compiled once per instruction set (see kernels_impl.h).
#pragma once

#include "kernels.h"

namespace loradash::cpu::LORADASH_ISA {
namespace {

inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

inline float load(float x) { return x; }
inline float load(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
// Exact: the shifted exponent is scaled by 2^112, infinities and NaN apart.
inline float load(fp16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = static_cast<uint32_t>(x.bits & 0x8000)
                                                                                  << 16;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u | magnitude : 0;
  return bits_float(sign | (special ? special : float_bits(bits_float(magnitude) * 0x1p112f)));
}

template <typename T>
inline T round_to(float x);
template <>
inline float round_to<float>(float x) {
  return x;
}
// Rounds to nearest even; NaN stays NaN.
template <>
inline bf16 round_to<bf16>(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : rounded)};
}
template <>
inline fp16 round_to<fp16>(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t half;
  // NaN first; then 65520 and above, which round to infinity.
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the adder rounds: the ulp of 0.5 is 2^-24, the step of fp16 subnormals.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <typename E, typename T>
inline E convert(T x) {
  return round_to<E>(load(x));
}
template <>
inline bf16 convert<bf16, bf16>(bf16 x) {
  return x;
}

}  // namespace
}  // namespace loradash::cpu::LORADASH_ISA
