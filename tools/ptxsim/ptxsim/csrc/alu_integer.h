// The generic handler runs an operation lane by lane; the integer operations follow.
#pragma once
#include <cfenv>
#include <cmath>

#include "lower.h"

// alu<F, D, S...> sets each destination lane (of type D) to F::f(source lanes (of types S...)).
template <class F, class D, class... S, size_t... I>
inline void alu_impl(Warp& w, const Inst& in, u32 m, std::index_sequence<I...>) {
  void* d = w.ptr(in.op[0]);
  const void* s[] = {w.ptr(in.op[1 + I])...};
  lanes(m, [&](int l) { wr<D>(d, l, F::f(rd<S>(s[I], l)...)); });
}
template <class F, class D, class... S>
void alu(Warp& w, const Inst& in, u32 m) {
  alu_impl<F, D, S...>(w, in, m, std::index_sequence_for<S...>{});
}

#define OP1(N, E)      \
  struct N {           \
    template <class T> \
    static T f(T a) {  \
      return (T)(E);   \
    }                  \
  }
#define OP2(N, E)          \
  struct N {               \
    template <class T>     \
    static T f(T a, T b) { \
      return (T)(E);       \
    }                      \
  }
#define OP3(N, E)               \
  struct N {                    \
    template <class T>          \
    static T f(T a, T b, T c) { \
      return (T)(E);            \
    }                           \
  }

template <class T>
struct Wide;
template <>
struct Wide<u8> {
  using type = u16;
};
template <>
struct Wide<u16> {
  using type = u32;
};
template <>
struct Wide<i16> {
  using type = i32;
};
template <>
struct Wide<u32> {
  using type = u64;
};
template <>
struct Wide<i32> {
  using type = i64;
};
template <>
struct Wide<u64> {
  using type = unsigned __int128;
};
template <>
struct Wide<i64> {
  using type = __int128;
};

OP2(Add, a + b);
OP2(Sub, a - b);
OP2(And, a& b);
OP2(Or, a | b);
OP2(Xor, a ^ b);
OP1(Not, ~a);
OP1(CNot, a == 0);
OP1(Neg, (T)0 - a);
OP1(Mov, a);
OP3(Sad, c + (a < b ? b - a : a - b));
struct MulLo {
  template <class T>
  static T f(T a, T b) {
    return (T)((u64)a * (u64)b);
  }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return (T)((u64)a * (u64)b + (u64)c);
  }
};
struct MulHi {
  template <class T>
  static T f(T a, T b) {
    return (T)(((typename Wide<T>::type)a * b) >> (8 * sizeof(T)));
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    return (T)((u64)MulHi::f(a, b) + (u64)c);
  }
};
struct MulWide {
  template <class T>
  static typename Wide<T>::type f(T a, T b) {
    return (typename Wide<T>::type)a * b;
  }
};
struct MadWide {
  template <class T, class W>
  static W f(T a, T b, W c) {
    return (W)((u64)((W)a * (W)b) + (u64)c);
  }
};
struct Mul24 {
  static u32 f(u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }
  static i32 f(i32 a, i32 b) { return (i32)((u32)(((a << 8) >> 8)) * (u32)((b << 8) >> 8)); }
};
struct Div {
  template <class T>
  static T f(T a, T b) {
    return b == 0 ? (T) ~(T)0 : (std::is_signed_v<T> && b == (T)-1) ? (T)(0 - (u64)a) : (T)(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    return b == 0 ? a : (std::is_signed_v<T> && b == (T)-1) ? (T)0 : (T)(a % b);
  }
};
struct Abs {
  template <class T>
  static T f(T a) {
    return a < 0 ? (T)(0 - (u64)a) : a;
  }
};
OP2(IMin, a < b ? a : b);
OP2(IMax, a > b ? a : b);
struct AddSat {
  static i32 f(i32 a, i32 b) {
    i64 r = (i64)a + b;
    return (i32)std::max<i64>(INT32_MIN, std::min<i64>(INT32_MAX, r));
  }
};
struct SubSat {
  static i32 f(i32 a, i32 b) {
    i64 r = (i64)a - b;
    return (i32)std::max<i64>(INT32_MIN, std::min<i64>(INT32_MAX, r));
  }
};
struct Shl {
  template <class T>
  static T f(T a, u32 n) {
    return n >= 8 * sizeof(T) ? (T)0 : (T)(a << n);
  }
};
struct Shr {
  template <class T>
  static T f(T a, u32 n) {
    return n >= 8 * sizeof(T) ? (T)(std::is_signed_v<T> && a < 0 ? -1 : 0) : (T)(a >> n);
  }
};
struct Shf {
  template <bool left, bool wrap>
  struct X {
    static u32 f(u32 a, u32 b, u32 c) {
      u32 n = wrap ? c & 31 : std::min(c, 32u);
      u64 v = (u64)b << 32 | a;
      return left ? (n == 32 ? a : (u32)((v << n) >> 32)) : (n == 32 ? b : (u32)(v >> n));
    }
  };
};
struct Popc {
  template <class T>
  static u32 f(T a) {
    return (u32)__builtin_popcountll((u64)a);
  }
};
struct Clz {
  template <class T>
  static u32 f(T a) {
    return a ? (u32)__builtin_clzll((u64)a) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
  }
};
struct Brev {
  template <class T>
  static T f(T a) {
    T r = 0;
    for (size_t i = 0; i < 8 * sizeof(T); i++) {
      r = (T)(r << 1 | (a & 1));
      a >>= 1;
    }
    return r;
  }
};
template <bool shiftamt>
struct Bfind {
  template <class T>
  static u32 f(T a) {
    if (std::is_signed_v<T> && a < 0) a = (T)~a;
    if (a == 0) return ~0u;
    u32 p = 63 - (u32)__builtin_clzll((u64)(std::make_unsigned_t<T>)a);
    return shiftamt ? 8 * sizeof(T) - 1 - p : p;
  }
};
struct Fns {
  static u32 f(u32 mask, u32 base, i32 off) {
    if (off == 0) return mask >> base & 1 ? base : ~0u;
    int step = off > 0 ? 1 : -1, left = std::abs(off);
    for (int p = (int)base; p >= 0 && p < 32; p += step)
      if (mask >> p & 1) {
        if (--left == 0) return (u32)p;
      }
    return ~0u;
  }
};
struct Bfe {
  template <class T>
  static T f(T a, u32 pos, u32 len) {
    pos &= 0xff;
    len &= 0xff;
    const u32 msb = 8 * sizeof(T) - 1;
    bool sign = std::is_signed_v<T> && len && ((u64)a >> std::min(pos + len - 1, msb) & 1);
    if (!len) return 0;
    if (pos > msb) return sign ? (T)-1 : 0;
    std::make_unsigned_t<T> v = (std::make_unsigned_t<T>)a >> pos;
    if (len <= msb) {
      u64 keep = (1ull << len) - 1;
      v &= (std::make_unsigned_t<T>)keep;
      if (sign) v |= (std::make_unsigned_t<T>)~keep;
    }
    if (sign && pos) {
      u32 have = msb + 1 - pos;
      if (have < 64) v |= (std::make_unsigned_t<T>)(~0ull << std::min(have, len));
    }
    return (T)v;
  }
};
struct Bfi {
  template <class T>
  static T f(T a, T b, u32 pos, u32 len) {
    pos &= 0xff;
    len &= 0xff;
    const u32 n = 8 * sizeof(T);
    if (pos >= n || !len) return b;
    T keep = len >= n ? (T) ~(T)0 : (T)(((T)1 << len) - 1);
    keep = (T)(keep << pos);
    return (T)((b & ~keep) | ((T)(a << pos) & keep));
  }
};
struct Bmsk {
  template <bool wrap>
  struct X {
    static u32 f(u32 a, u32 b) {
      if (wrap) {
        a &= 31;
        b &= 31;
      }
      if (a >= 32 || !b) return 0;
      u32 k = b >= 32 ? ~0u : (1u << b) - 1;
      return k << a;
    }
  };
};
struct Szext {
  template <class T, bool wrap>
  struct X {
    static T f(T a, u32 n) {
      if (wrap) n &= 31;
      if (n >= 32) return a;
      if (!n) return 0;
      u32 v = (u32)a << (32 - n);
      return std::is_signed_v<T> ? (T)((i32)v >> (32 - n)) : (T)(v >> (32 - n));
    }
  };
};
inline u32 prmt(u32 a, u32 b, u32 sel, int mode) {
  u64 v = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = sel >> (4 * i) & 15;
    u32 k = sel & 3;
    switch (mode) {
      case 1:
        s = (k + i) & 7;
        break;
      case 2:
        s = (k - i) & 7;
        break;
      case 3:
        s = k;
        break;
      case 4:
        s = std::max<u32>(k, i);
        break;
      case 5:
        s = std::min<u32>(k, i);
        break;
      case 6:
        s = (k & 1) * 2 + (i & 1);
        break;
      default:
        break;
    }
    u32 byte = (u32)(v >> (8 * (s & 7))) & 0xff;
    if (mode == 0 && (s & 8)) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}
template <int mode>
struct Prmt {
  static u32 f(u32 a, u32 b, u32 c) { return prmt(a, b, c, mode); }
};
template <bool sa, bool sb>
struct Dp4a {
  static u32 f(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++) {
      i32 x = sa ? (i32)(i8)(a >> 8 * i) : (i32)(u8)(a >> 8 * i),
          y = sb ? (i32)(i8)(b >> 8 * i) : (i32)(u8)(b >> 8 * i);
      c += (u32)(x * y);
    }
    return c;
  }
};
template <bool sa, bool sb, bool hi>
struct Dp2a {
  static u32 f(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 2; i++) {
      i32 x = sa ? (i32)(i16)(a >> 16 * i) : (i32)(u16)(a >> 16 * i);
      u32 q = b >> 8 * (i + (hi ? 2 : 0));
      i32 y = sb ? (i32)(i8)q : (i32)(u8)q;
      c += (u32)(x * y);
    }
    return c;
  }
};
