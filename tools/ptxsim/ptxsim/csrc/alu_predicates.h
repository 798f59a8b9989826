// Comparisons, predicates, selections, lop3 and the carry flag are run here.
#pragma once
#include "alu_float.h"

template <int op>
void pred_logic(Warp& w, const Inst& in, u32 m) {
  u32 a = w.pred(in.op[1]), b = in.nop > 2 ? w.pred(in.op[2]) : 0;
  w.set_pred(in.op[0], m, op == 0 ? a & b : op == 1 ? a | b : op == 2 ? a ^ b : op == 3 ? ~a : a);
}
enum { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
template <int c>
struct Cmp {
  template <class T>
  static bool f(T a, T b) {
    bool un = a != a || b != b;
    switch (c) {
      case kEq:
        return a == b;
      case kNe:
        return !un && a != b;
      case kLt:
        return a < b;
      case kLe:
        return a <= b;
      case kGt:
        return a > b;
      case kGe:
        return a >= b;
      case kEqu:
        return un || a == b;
      case kNeu:
        return a != b;
      case kLtu:
        return un || a < b;
      case kLeu:
        return un || a <= b;
      case kGtu:
        return un || a > b;
      case kGeu:
        return un || a >= b;
      case kNum:
        return !un;
      default:
        return un;
    }
  }
};
inline u32 combine(int how, u32 r, u32 c) { return how == 0 ? r & c : how == 1 ? r | c : how == 2 ? r ^ c : r; }
// Operands are p, q, a, b [, c].
template <class C, class T, bool ftz>
void setp_h(Warp& w, const Inst& in, u32 m) {
  const void *a = w.ptr(in.op[2]), *b = w.ptr(in.op[3]);
  u32 r = 0;
  auto one = [&](int l) {
    auto x = rd<T>(a, l);
    auto y = rd<T>(b, l);
    if constexpr (ftz) {
      x = flush(x);
      y = flush(y);
    }
    r |= (u32)C::f(x, y) << l;
  };
  lanes(m, one);
  u32 c = in.nop > 4 ? w.pred(in.op[4]) : 0;
  w.set_pred(in.op[0], m, combine(in.sub, r, c));
  w.set_pred(in.op[1], m, combine(in.sub, ~r, c));
}
template <class C, class H>
void setp_h2(Warp& w, const Inst& in, u32 m) {
  const void *a = w.ptr(in.op[2]), *b = w.ptr(in.op[3]);
  u32 r[2] = {0, 0};
  lanes(m, [&](int l) {
    u32 x = rd<u32>(a, l), y = rd<u32>(b, l);
    for (int h = 0; h < 2; h++)
      r[h] |= (u32)C::f(Packed<Mov, H>::up(x >> 16 * h), Packed<Mov, H>::up(y >> 16 * h)) << l;
  });
  u32 c = in.nop > 4 ? w.pred(in.op[4]) : 0;
  w.set_pred(in.op[0], m, combine(in.sub, r[0], c));
  w.set_pred(in.op[1], m, combine(in.sub, r[1], c));
}
template <class C>
Inst::Fn setp_fn(Dec& d, Ty t, bool ftz) {
  switch (t) {
    case Ty::f32:
      return ftz ? setp_h<C, float, true> : setp_h<C, float, false>;
    case Ty::f64:
      return setp_h<C, double, false>;
    case Ty::f16:
      return setp_h<C, f16t, false>;
    case Ty::bf16:
      return setp_h<C, bf16t, false>;
    case Ty::f16x2:
      return setp_h2<C, f16t>;
    case Ty::bf16x2:
      return setp_h2<C, bf16t>;
    default:
      break;
  }
  BY_SIGN((setp_h<C, T, false>))
}
inline Inst::Fn cmp_fn(Dec& d, int c, Ty t, bool ftz) {
  switch (c) {
#define C(k) \
  case k:    \
    return setp_fn<Cmp<k>>(d, t, ftz)
    C(kEq);
    C(kNe);
    C(kLt);
    C(kLe);
    C(kGt);
    C(kGe);
    C(kEqu);
    C(kNeu);
    C(kLtu);
    C(kLeu);
    C(kGtu);
    C(kGeu);
    C(kNum);
    default:
      return setp_fn<Cmp<kNan>>(d, t, ftz);
#undef C
  }
}
inline int take_cmp(Dec& d) {
  int c = d.take_of({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan", "lo",
                     "ls", "hi", "hs"});
  if (c < 0) d.fail("missing comparison");
  return c >= 14 ? (c == 14 ? kLt : c == 15 ? kLe : c == 16 ? kGt : kGe) : c;
}
template <class T>
void selp_h(Warp& w, const Inst& in, u32 m) {
  void* d = w.ptr(in.op[0]);
  const void *a = w.ptr(in.op[1]), *b = w.ptr(in.op[2]);
  u32 p = w.pred(in.op[3]);
  lanes(m, [&](int l) { wr<T>(d, l, p >> l & 1 ? rd<T>(a, l) : rd<T>(b, l)); });
}
template <class T, class C>
void slct_h(Warp& w, const Inst& in, u32 m) {
  void* d = w.ptr(in.op[0]);
  const void *a = w.ptr(in.op[1]), *b = w.ptr(in.op[2]), *c = w.ptr(in.op[3]);
  lanes(m, [&](int l) { wr<T>(d, l, rd<C>(c, l) >= 0 ? rd<T>(a, l) : rd<T>(b, l)); });
}
// The predicate of set.cmp goes through a scratch slot, then becomes -1/0, 1.0/0.0 ...
inline void set_value(Warp& w, const Inst& in, u32 m) {
  void* d = w.ptr(in.op[0]);
  u32 p = w.pred(in.op[1]), q = in.nop > 2 ? w.pred(in.op[2]) : 0;
  lanes(m, [&](int l) {
    u32 on = p >> l & 1, oq = q >> l & 1;
    u32 v;
    switch (in.ty) {
      case Ty::f32:
        v = on ? 0x3f800000 : 0;
        break;
      case Ty::f16:
        v = on ? 0x3c00 : 0;
        break;
      case Ty::bf16:
        v = on ? 0x3f80 : 0;
        break;
      case Ty::f16x2:
        v = (on ? 0x3c00 : 0) | (oq ? 0x3c000000 : 0);
        break;
      case Ty::bf16x2:
        v = (on ? 0x3f80 : 0) | (oq ? 0x3f800000 : 0);
        break;
      default:
        v = on ? ~0u : 0;
    }
    if (in.sub) v = (on ? 0xffffu : 0) | (oq ? 0xffff0000u : 0);
    wr<u32>(d, l, v);
  });
}
struct Lop3 {
  static void h(Warp& w, const Inst& in, u32 m) {
    void* d = w.ptr(in.op[0]);
    const void *a = w.ptr(in.op[1]), *b = w.ptr(in.op[2]), *c = w.ptr(in.op[3]);
    const u32 t = (u32)in.imm;
    u32 k[8];
    for (int i = 0; i < 8; i++) k[i] = t >> i & 1 ? ~0u : 0;
    lanes(m, [&](int l) {
      u32 x = rd<u32>(a, l), y = rd<u32>(b, l), z = rd<u32>(c, l);
      u32 lo = (k[0] & ~y & ~z) | (k[1] & ~y & z) | (k[2] & y & ~z) | (k[3] & y & z),
          hi = (k[4] & ~y & ~z) | (k[5] & ~y & z) | (k[6] & y & ~z) | (k[7] & y & z);
      wr<u32>(d, l, (x & hi) | (~x & lo));
    });
  }
};
// Additions and subtractions with carry keep the carry flag in a hidden predicate register.
// Operands are d, a, b, flag; bit 0 of sub says carry in, bit 1 carry out.
template <class T, bool sub>
void addc_h(Warp& w, const Inst& in, u32 m) {
  void* d = w.ptr(in.op[0]);
  const void *a = w.ptr(in.op[1]), *b = w.ptr(in.op[2]);
  u32 cin = in.sub & 1 ? w.pred(in.op[3]) : 0, out = 0;
  lanes(m, [&](int l) {
    using W = unsigned __int128;
    T x = rd<T>(a, l), y = rd<T>(b, l);
    u32 c = cin >> l & 1;
    W r = sub ? (W)x - y - c : (W)x + y + c;
    out |= (u32)((r >> (8 * sizeof(T))) & 1) << l;
    wr<T>(d, l, (T)r);
  });
  if (in.sub & 2) w.set_pred(in.op[3], m, out);
}
// Operands are d, a, b, c, flag.
template <class T, bool hi>
void madc_h(Warp& w, const Inst& in, u32 m) {
  void* d = w.ptr(in.op[0]);
  const void *a = w.ptr(in.op[1]), *b = w.ptr(in.op[2]), *c = w.ptr(in.op[3]);
  u32 cin = in.sub & 1 ? w.pred(in.op[4]) : 0, out = 0;
  lanes(m, [&](int l) {
    using W = unsigned __int128;
    T p = hi ? MulHi::f(rd<T>(a, l), rd<T>(b, l)) : (T)((u64)rd<T>(a, l) * (u64)rd<T>(b, l));
    W r = (W)(std::make_unsigned_t<T>)p + (std::make_unsigned_t<T>)rd<T>(c, l) + (cin >> l & 1);
    out |= (u32)((r >> (8 * sizeof(T))) & 1) << l;
    wr<T>(d, l, (T)r);
  });
  if (in.sub & 2) w.set_pred(in.op[4], m, out);
}
inline Opnd carry_flag(Dec& d) { return d.lo.sreg("%carry", Ty::pred); }
