// A type picks the instance of an operation here; the floating-point operations follow, with their rounding modes.
#pragma once
#include "alu_integer.h"

// *_size picks the same code for signed, unsigned and untyped; *_sign picks by the exact type.
template <class F>
Inst::Fn un_size(Dec& d, Ty t) {
  switch (size_of(t)) {
    case 1:
      return alu<F, u8, u8>;
    case 2:
      return alu<F, u16, u16>;
    case 4:
      return alu<F, u32, u32>;
    case 8:
      return alu<F, u64, u64>;
  }
  d.fail("bad type");
}
template <class F>
Inst::Fn bin_size(Dec& d, Ty t) {
  switch (size_of(t)) {
    case 2:
      return alu<F, u16, u16, u16>;
    case 4:
      return alu<F, u32, u32, u32>;
    case 8:
      return alu<F, u64, u64, u64>;
  }
  d.fail("bad type");
}
template <class F>
Inst::Fn tri_size(Dec& d, Ty t) {
  switch (size_of(t)) {
    case 2:
      return alu<F, u16, u16, u16, u16>;
    case 4:
      return alu<F, u32, u32, u32, u32>;
    case 8:
      return alu<F, u64, u64, u64, u64>;
  }
  d.fail("bad type");
}
#define BY_SIGN(EXPR)     \
  switch (t) {            \
    case Ty::u16:         \
    case Ty::b16: {       \
      using T = u16;      \
      return EXPR;        \
    }                     \
    case Ty::s16: {       \
      using T = i16;      \
      return EXPR;        \
    }                     \
    case Ty::u32:         \
    case Ty::b32: {       \
      using T = u32;      \
      return EXPR;        \
    }                     \
    case Ty::s32: {       \
      using T = i32;      \
      return EXPR;        \
    }                     \
    case Ty::u64:         \
    case Ty::b64: {       \
      using T = u64;      \
      return EXPR;        \
    }                     \
    case Ty::s64: {       \
      using T = i64;      \
      return EXPR;        \
    }                     \
    default:              \
      d.fail("bad type"); \
  }
template <class F>
Inst::Fn un_sign(Dec& d, Ty t) {
  BY_SIGN((alu<F, T, T>))
}
template <class F>
Inst::Fn bin_sign(Dec& d, Ty t) {
  BY_SIGN((alu<F, T, T, T>))
}
template <class F>
Inst::Fn tri_sign(Dec& d, Ty t) {
  BY_SIGN((alu<F, T, T, T, T>))
}
template <class F>
Inst::Fn shift(Dec& d, Ty t) {
  BY_SIGN((alu<F, T, T, u32>))
}

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return x; }
template <class T>
T saturate(T x) {
  return x != x ? (T)0 : x < 0 ? (T)0 : x > 1 ? (T)1 : x == 0 ? (T)0 : x;
}
template <class T>
T f_min(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T f_max(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
template <class T>
T quiet() {
  return sizeof(T) == 4 ? (T)bitcast<float>(0x7fffffffu) : std::numeric_limits<T>::quiet_NaN();
}
OP2(FAdd, a + b);
OP2(FSub, a - b);
OP2(FMul, a* b);
OP2(FDiv, a / b);
struct Fma {
  static float f(float a, float b, float c) { return std::fma(a, b, c); }
  static double f(double a, double b, double c) { return std::fma(a, b, c); }
};
struct FmaRelu {
  static float f(float a, float b, float c) {
    float r = std::fma(a, b, c);
    return r != r ? quiet<float>() : r > 0 ? r : 0.0f;
  }
};
OP1(FNeg, -a);
OP1(FAbs, std::fabs(a));
OP1(Rcp, (T)1 / a);
OP1(Sqrt, std::sqrt(a));
OP2(FMin, f_min(a, b));
OP2(FMax, f_max(a, b));
OP2(FMinNan, (a != a || b != b) ? quiet<T>() : f_min(a, b));
OP2(FMaxNan, (a != a || b != b) ? quiet<T>() : f_max(a, b));
struct FMinXor {
  static float f(float a, float b) {
    float s = std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f;
    return std::copysign(f_min(std::fabs(a), std::fabs(b)), s);
  }
};
struct FMaxXor {
  static float f(float a, float b) {
    float s = std::signbit(a) != std::signbit(b) ? -1.0f : 1.0f;
    return std::copysign(f_max(std::fabs(a), std::fabs(b)), s);
  }
};
OP2(CopySign, std::copysign(b, a));
struct Rsqrt {
  template <class T>
  static T f(T a) {
    return (T)(1.0 / std::sqrt((double)a));
  }
};
struct Ex2 {
  static float f(float a) { return std::exp2(a); }
};
struct Lg2 {
  static float f(float a) { return (float)std::log2(a); }
};
struct Sin {
  static float f(float a) { return (float)std::sin((double)a); }
};
struct Cos {
  static float f(float a) { return (float)std::cos((double)a); }
};
struct Tanh {
  static float f(float a) { return std::tanh(a); }
};
struct TestP {
  template <int k>
  struct X {
    template <class T>
    static bool f(T a) {
      switch (k) {
        case 0:
          return std::isfinite(a);
        case 1:
          return std::isinf(a);
        case 2:
          return !std::isnan(a);
        case 3:
          return std::isnan(a);
        case 4:
          return std::isnormal(a);
        default:
          return std::fpclassify(a) == FP_SUBNORMAL;
      }
    }
  };
};

template <class F, bool ftz, bool sat>
struct Fx {
  template <class... T>
  static auto f(T... a) {
    auto r = F::f((ftz ? flush(a) : a)...);
    if (ftz) r = flush(r);
    return sat ? saturate(r) : r;
  }
};
// Rounded runs the operation under the C rounding mode.
template <class F, int mode>
struct Rounded {
  template <class... T>
  __attribute__((noinline)) static auto f(T... a) {
    int old = fegetround();
    fesetround(mode);
    volatile auto r = F::f(*(volatile T*)&a...);
    fesetround(old);
    return (decltype(F::f(a...)))r;
  }
};
template <class F, class T, class... S>
Inst::Fn fmode(bool ftz, bool sat) {
  return ftz   ? (sat ? alu<Fx<F, true, true>, T, S...> : alu<Fx<F, true, false>, T, S...>)
         : sat ? alu<Fx<F, false, true>, T, S...>
               : alu<F, T, S...>;
}
// Packed handles two 16-bit lanes in one 32-bit register.
template <class F, class H, bool relu = false>
struct Packed {
  static float up(u32 x) {
    if constexpr (std::is_same_v<H, f16t>)
      return f16_to_f32((u16)x);
    else
      return bf16_to_f32((u16)x);
  }
  template <class V>
  static u32 down(V v) {
    u32 t[1];
    wr<H>(t, 0, v);
    return t[0];
  }
  template <class... A>
  static u32 f(A... a) {
    return down(F::f(up(a)...)) | down(F::f(up(a >> 16)...)) << 16;
  }
};
// An f16 or bf16 fma is exact in double before the one rounding.
struct HFma {
  static double f(float a, float b, float c) { return (double)a * b + (double)c; }
};
struct HFmaRelu {
  static double f(float a, float b, float c) {
    double r = (double)a * b + (double)c;
    return r != r || r > 0 ? r : 0.0;
  }
};
template <class F>
struct Sat {
  template <class... A>
  static auto f(A... a) {
    return saturate(F::f(a...));
  }
};

template <class F, class H, class H2, class... S>
Inst::Fn halves(bool packed, bool sat);
// N... holds one dummy per source.
template <class F, class... N>
Inst::Fn float_fn(Dec& d, Ty t) {
  bool ftz = d.take("ftz"), sat = d.take("sat");
  int rm = d.take_of({"rn", "rz", "rm", "rp"});
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  (void)modes;
  switch (t) {
    case Ty::f32:
      switch (rm) {
        case 1:
          return fmode<Rounded<F, FE_TOWARDZERO>, float, std::conditional_t<true, float, N>...>(ftz, sat);
        case 2:
          return fmode<Rounded<F, FE_DOWNWARD>, float, std::conditional_t<true, float, N>...>(ftz, sat);
        case 3:
          return fmode<Rounded<F, FE_UPWARD>, float, std::conditional_t<true, float, N>...>(ftz, sat);
      }
      return fmode<F, float, std::conditional_t<true, float, N>...>(ftz, sat);
    case Ty::f64:
      switch (rm) {
        case 1:
          return alu<Rounded<F, FE_TOWARDZERO>, double, std::conditional_t<true, double, N>...>;
        case 2:
          return alu<Rounded<F, FE_DOWNWARD>, double, std::conditional_t<true, double, N>...>;
        case 3:
          return alu<Rounded<F, FE_UPWARD>, double, std::conditional_t<true, double, N>...>;
      }
      return alu<F, double, std::conditional_t<true, double, N>...>;
    default:
      d.fail("bad type");
  }
}
template <class F, class... N>
Inst::Fn half_fn(Dec& d, Ty t) {
  d.take("ftz");
  bool sat = d.take("sat");
  d.take("rn");
  switch (t) {
    case Ty::f16:
      return sat ? alu<Sat<F>, f16t, std::conditional_t<true, f16t, N>...>
                 : alu<F, f16t, std::conditional_t<true, f16t, N>...>;
    case Ty::bf16:
      return sat ? alu<Sat<F>, bf16t, std::conditional_t<true, bf16t, N>...>
                 : alu<F, bf16t, std::conditional_t<true, bf16t, N>...>;
    case Ty::f16x2:
      return sat ? alu<Packed<Sat<F>, f16t>, u32, std::conditional_t<true, u32, N>...>
                 : alu<Packed<F, f16t>, u32, std::conditional_t<true, u32, N>...>;
    case Ty::bf16x2:
      return sat ? alu<Packed<Sat<F>, bf16t>, u32, std::conditional_t<true, u32, N>...>
                 : alu<Packed<F, bf16t>, u32, std::conditional_t<true, u32, N>...>;
    default:
      d.fail("bad type");
  }
}
inline bool is_half(Ty t) { return t == Ty::f16 || t == Ty::bf16 || t == Ty::f16x2 || t == Ty::bf16x2; }
inline Cls cls_of(Ty t) {
  return t == Ty::f32 || t == Ty::tf32 ? Cls::fp32
         : t == Ty::f64                ? Cls::fp64
         : is_half(t)                  ? Cls::fp16
         : t == Ty::pred               ? Cls::pred
                                       : Cls::int_alu;
}
template <class F, class... N>
Inst::Fn any_float(Dec& d, Ty t) {
  return is_half(t) ? half_fn<F, N...>(d, t) : float_fn<F, N...>(d, t);
}
inline void emit_alu(Dec& d, Inst::Fn fn, Ty t, int nsrc, Ty last = Ty::none, float flops = 0) {
  d.dst(t);
  for (int i = 0; i < nsrc; i++) d.src(i == nsrc - 1 && last != Ty::none ? last : t);
  d.in.ty = t;
  if (is_float(t)) d.in.flops = flops * (t == Ty::f16x2 || t == Ty::bf16x2 ? 2 : 1);
  d.emit(fn, cls_of(t));
}
