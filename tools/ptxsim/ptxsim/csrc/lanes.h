// A register slot is read and written lane by lane, as the type that an instruction names.
#pragma once
#include "base.h"

// These tags are read as float and rounded on write.
struct f16t {};
struct bf16t {};
// The integer form vectorises, is exact for subnormals and keeps NaN payloads.
inline float f16_to_f32(u16 h) {
  u32 em = (u32)(h & 0x7fff) << 13;
  u32 v = bitcast<u32>(bitcast<float>(em) * 0x1p112f);
  return bitcast<float>((em >= 0x0f800000u ? em | 0x7f800000u : v) | (u32)(h & 0x8000) << 16);
}
inline u16 f32_to_f16(float f) { return bitcast<u16>((_Float16)f); }
inline float bf16_to_f32(u16 h) { return bitcast<float>((u32)h << 16); }
inline u16 f32_to_bf16(float f) {
  u32 b = bitcast<u32>(f);
  return (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
// Rounds double to float; an inexact result gets an odd last bit.
inline float round_odd(double d) {
  float f = (float)d;
  if ((double)f == d || f != f || !__builtin_isfinite(d)) return f;
  u32 b = bitcast<u32>(f);
  if (b & 1) return f;
  // A value that was rounded away from zero takes a step back, which gives an odd pattern.
  bool away = std::abs((double)f) > std::abs(d);
  return bitcast<float>(away ? b - 1 : b + 1);
}
inline u16 f64_to_bf16(double d) { return f32_to_bf16(round_odd(d)); }
inline u16 f64_to_f16(double d) { return f32_to_f16(round_odd(d)); }

template <class T>
struct Val {
  using type = T;
};
template <>
struct Val<f16t> {
  using type = float;
};
template <>
struct Val<bf16t> {
  using type = float;
};
template <class T>
inline typename Val<T>::type rd(const void* p, int l) {
  if constexpr (std::is_same_v<T, f16t>)
    return f16_to_f32((u16)((const u32*)p)[l]);
  else if constexpr (std::is_same_v<T, bf16t>)
    return bf16_to_f32((u16)((const u32*)p)[l]);
  else if constexpr (sizeof(T) == 8)
    return bitcast<T>(((const u64*)p)[l]);
  else if constexpr (sizeof(T) == 4)
    return bitcast<T>(((const u32*)p)[l]);
  else
    return (T)((const u32*)p)[l];
}
template <class T, class V>
inline void wr(void* p, int l, V v) {
  if constexpr (std::is_same_v<T, f16t>)
    ((u32*)p)[l] = std::is_same_v<V, double> ? f64_to_f16(v) : f32_to_f16((float)v);
  else if constexpr (std::is_same_v<T, bf16t>)
    ((u32*)p)[l] = std::is_same_v<V, double> ? f64_to_bf16(v) : f32_to_bf16((float)v);
  else if constexpr (sizeof(T) == 8)
    ((u64*)p)[l] = bitcast<u64>((T)v);
  else if constexpr (sizeof(T) == 4)
    ((u32*)p)[l] = bitcast<u32>((T)v);
  else
    ((u32*)p)[l] = (u32)(T)v;
}
template <class F>
__attribute__((always_inline)) inline void lanes(u32 m, F&& f) {
  if (m == kFull) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; l++) f(l);
  } else
    for (; m; m &= m - 1) f(__builtin_ctz(m));
}
