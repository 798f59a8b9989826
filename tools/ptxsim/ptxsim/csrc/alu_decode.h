// mov and packing are run here, and the modifiers of arithmetic instructions pick their handlers.
#pragma once
#include "alu_predicates.h"

inline void mov_b128(Warp& w, const Inst& in, u32 m) {
  u8* d = (u8*)w.ptr(in.op[0]);
  const u8* s = (const u8*)w.ptr(in.op[1]);
  lanes(m, [&](int l) { std::memcpy(d + 16 * l, s + 16 * l, 16); });
}
// These run mov.bN d, {a, b, ...} and mov.bN {a, b, ...}, d; sub counts the pieces, elem is the size of a piece in
// bytes.
inline void pack_h(Warp& w, const Inst& in, u32 m) {
  u8* d = (u8*)w.ptr(in.op[0]);
  u32 dw = in.elem * in.sub;
  u32 stride = dw == 16 ? 16 : dw == 8 ? 8 : 4;
  for (int i = 0; i < in.sub; i++) {
    const u8* s = (const u8*)w.ptr(in.op[1 + i]);
    u32 ss = in.elem == 8 ? 8 : 4;
    for (u32 k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      if (!i && dw < 4) std::memset(d + stride * l, 0, 4);
      std::memcpy(d + stride * l + i * in.elem, s + ss * l, in.elem);
    }
  }
}
inline void unpack_h(Warp& w, const Inst& in, u32 m) {
  const u8* s = (const u8*)w.ptr(in.op[in.sub]);
  u32 sw = in.elem * in.sub, stride = sw == 16 ? 16 : sw == 8 ? 8 : 4;
  u8 copy[16 * kLanes];
  std::memcpy(copy, s, stride * kLanes);
  for (int i = 0; i < in.sub; i++) {
    u8* d = (u8*)w.ptr(in.op[i]);
    u32 ds = in.elem == 8 ? 8 : 4;
    for (u32 k = m; k; k &= k - 1) {
      int l = __builtin_ctz(k);
      if (in.elem < 4) std::memset(d + ds * l, 0, 4);
      std::memcpy(d + ds * l, copy + stride * l + i * in.elem, in.elem);
    }
  }
}
template <int what>
void clock_h(Warp& w, const Inst& in, u32 m) {
  void* d = w.ptr(in.op[0]);
  u64 t = w.lc->clock;
  lanes(m, [&](int l) {
    if (what == 0)
      wr<u32>(d, l, (u32)t);
    else if (what == 1)
      wr<u64>(d, l, t);
    else if (what == 2)
      wr<u32>(d, l, (u32)(t >> 32));
    else
      wr<u32>(d, l, w.active);
  });
}
inline void decode_mov(Dec& d) {
  if (d.take("multicast")) d.fail("unsupported");
  d.take("uni");
  d.take("sync");
  d.take("aligned");
  Ty t = d.type();
  d.in.ty = t;
  if (d.nops() != 2) d.fail("bad mov");
  const RawOp &a = d.raw(0), &b = d.raw(1);
  static const std::pair<const char*, Inst::Fn> dynamic[] = {
      {"%clock", clock_h<0>},       {"%clock_hi", clock_h<2>},       {"%clock64", clock_h<1>},
      {"%globaltimer", clock_h<1>}, {"%globaltimer_lo", clock_h<0>}, {"%globaltimer_hi", clock_h<2>},
      {"%activemask", clock_h<3>}};
  for (auto& e : dynamic)
    if (b.text == e.first) {
      d.dst(t);
      d.next++;
      d.emit(e.second, Cls::mov);
      return;
    }
  if (a.k == RawOp::vec || b.k == RawOp::vec) {
    bool un = a.k == RawOp::vec;
    size_t n = (un ? a : b).sub.size();
    d.in.sub = (u8)n;
    d.in.elem = (u8)(size_of(t) / n);
    Ty et = d.in.elem == 8 ? Ty::b64 : d.in.elem == 4 ? Ty::b32 : d.in.elem == 2 ? Ty::b16 : Ty::b8;
    if (un) {
      d.dst(et);
      d.src(t);
      d.emit(unpack_h, Cls::mov);
    } else {
      d.dst(t);
      d.src(et);
      d.emit(pack_h, Cls::mov);
    }
    return;
  }
  d.dst(t);
  d.src(t);
  if (t == Ty::pred) {
    d.emit(pred_logic<4>, Cls::pred);
    return;
  }
  d.emit(t == Ty::b128 ? mov_b128 : un_size<Mov>(d, t), Cls::mov);
}

template <class FI, class FF>
void addsub(Dec& d, bool sub) {
  bool cc = d.take("cc");
  Ty t = d.opt_type();
  if (t == Ty::none) d.fail("missing type");
  if (is_float(t)) {
    d.in.flops = 1;
    Inst::Fn fn = any_float<FF, int, int>(d, t);
    emit_alu(d, fn, t, 2, Ty::none, 1);
    return;
  }
  if (cc) {
    d.in.sub = 2;
    d.dst(t);
    d.src(t);
    d.src(t);
    d.ops.push_back(carry_flag(d));
    d.emit(size_of(t) == 8 ? (sub ? addc_h<u64, true> : addc_h<u64, false>)
                           : (sub ? addc_h<u32, true> : addc_h<u32, false>),
           Cls::int_alu);
    return;
  }
  if (d.take("sat")) {
    emit_alu(d, sub ? alu<SubSat, i32, i32, i32> : alu<AddSat, i32, i32, i32>, t, 2);
    return;
  }
  if (t == Ty::none) d.fail("bad type");
  emit_alu(d, bin_size<FI>(d, t), t, 2);
}
template <bool sub>
void addc(Dec& d) {
  bool cc = d.take("cc");
  Ty t = d.type();
  d.in.sub = 1 | (cc ? 2 : 0);
  d.dst(t);
  d.src(t);
  d.src(t);
  d.ops.push_back(carry_flag(d));
  d.emit(size_of(t) == 8 ? addc_h<u64, sub> : addc_h<u32, sub>, Cls::int_alu);
}
template <class F>
void logic(Dec& d, int p) {
  Ty t = d.type();
  if (t == Ty::pred) {
    d.dst(t);
    d.src(t);
    d.src(t);
    d.emit(p == 0 ? pred_logic<0> : p == 1 ? pred_logic<1> : pred_logic<2>, Cls::pred);
    return;
  }
  emit_alu(d, bin_size<F>(d, t), t, 2);
}
inline void decode_mad(Dec& d, bool carry) {
  if (d.base == "fma" || d.mods.empty() || d.mods.back() == "f32" || d.mods.back() == "f64") {
    Ty t = d.type();
    if (d.base == "mad" && !is_float(t)) d.fail("bad mad");
    if (d.take("relu")) {
      d.take("rn");
      d.take("ftz");
      Inst::Fn fn = t == Ty::f16     ? alu<HFmaRelu, f16t, f16t, f16t, f16t>
                    : t == Ty::bf16  ? alu<HFmaRelu, bf16t, bf16t, bf16t, bf16t>
                    : t == Ty::f16x2 ? alu<Packed<HFmaRelu, f16t>, u32, u32, u32, u32>
                                     : alu<Packed<HFmaRelu, bf16t>, u32, u32, u32, u32>;
      emit_alu(d, fn, t, 3, Ty::none, 2);
      return;
    }
    Inst::Fn fn = is_half(t) ? half_fn<HFma, int, int, int>(d, t) : float_fn<Fma, int, int, int>(d, t);
    emit_alu(d, fn, t, 3, Ty::none, 2);
    return;
  }
  bool cc = d.take("cc");
  int k = d.take_of({"lo", "hi", "wide"});
  Ty t = d.type();
  if (k == 2) {
    Ty wt = size_of(t) == 2 ? Ty::u32 : Ty::u64;
    Inst::Fn fn = t == Ty::u16   ? alu<MadWide, u32, u16, u16, u32>
                  : t == Ty::s16 ? alu<MadWide, i32, i16, i16, i32>
                  : t == Ty::u32 ? alu<MadWide, u64, u32, u32, u64>
                                 : alu<MadWide, i64, i32, i32, i64>;
    d.dst(wt);
    d.src(t);
    d.src(t);
    d.src(wt);
    d.emit(fn, Cls::int_alu);
    return;
  }
  if (carry || cc) {
    d.in.sub = (carry ? 1 : 0) | (cc ? 2 : 0);
    d.dst(t);
    d.src(t);
    d.src(t);
    d.src(t);
    d.ops.push_back(carry_flag(d));
    Inst::Fn fn = k == 0         ? (size_of(t) == 8 ? madc_h<u64, false> : madc_h<u32, false>)
                  : t == Ty::u64 ? madc_h<u64, true>
                  : t == Ty::s64 ? madc_h<i64, true>
                  : t == Ty::s32 ? madc_h<i32, true>
                                 : madc_h<u32, true>;
    d.emit(fn, Cls::int_alu);
    return;
  }
  if (d.take("sat")) d.fail("mad.hi.sat is not supported");
  emit_alu(d, k == 0 ? tri_size<MadLo>(d, t) : tri_sign<MadHi>(d, t), t, 3);
}
inline void decode_mul(Dec& d) {
  int k = d.take_of({"lo", "hi", "wide"});
  Ty t = d.type();
  if (is_float(t)) {
    Inst::Fn fn = any_float<FMul, int, int>(d, t);
    emit_alu(d, fn, t, 2, Ty::none, 1);
    return;
  }
  if (k == 2) {
    Inst::Fn fn = t == Ty::u16   ? alu<MulWide, u32, u16, u16>
                  : t == Ty::s16 ? alu<MulWide, i32, i16, i16>
                  : t == Ty::u32 ? alu<MulWide, u64, u32, u32>
                                 : alu<MulWide, i64, i32, i32>;
    d.dst(size_of(t) == 2 ? Ty::u32 : Ty::u64);
    d.src(t);
    d.src(t);
    d.emit(fn, Cls::int_alu);
    return;
  }
  emit_alu(d, k == 0 ? bin_size<MulLo>(d, t) : bin_sign<MulHi>(d, t), t, 2);
}
template <bool mx>
void minmax(Dec& d) {
  bool nan = d.take("NaN"), relu = d.take("relu");
  bool xs = d.take("xorsign");
  if (xs) d.take("abs");
  Ty t = d.type();
  if (is_float(t)) {
    if (relu) d.fail("unsupported");
    Inst::Fn fn = xs    ? (d.take("ftz"), mx ? alu<FMaxXor, float, float, float> : alu<FMinXor, float, float, float>)
                  : nan ? (mx ? any_float<FMaxNan, int, int>(d, t) : any_float<FMinNan, int, int>(d, t))
                        : (mx ? any_float<FMax, int, int>(d, t) : any_float<FMin, int, int>(d, t));
    emit_alu(d, fn, t, 2, Ty::none, 1);
    return;
  }
  emit_alu(d, mx ? bin_sign<IMax>(d, t) : bin_sign<IMin>(d, t), t, 2);
}
// sfu decodes approximations and correctly rounded functions of one source.
template <class F>
void sfu(Dec& d) {
  bool approx = d.take("approx");
  Ty t = d.type();
  Inst::Fn fn = any_float<F, int>(d, t);
  d.dst(t);
  d.src(t);
  d.in.ty = t;
  d.emit(fn, approx ? Cls::sfu : cls_of(t));
}
template <class F>
void unary(Dec& d, Inst::Fn (*f)(Dec&, Ty)) {
  Ty t = d.type();
  emit_alu(d, f(d, t), t, 1);
}
template <class F>
void count_bits(Dec& d) {
  Ty t = d.type();
  d.dst(Ty::u32);
  d.src(t);
  d.emit(size_of(t) == 8 ? alu<F, u32, u64> : alu<F, u32, u32>, Cls::int_alu);
}
