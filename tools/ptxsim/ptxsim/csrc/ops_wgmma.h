// wgmma is run here: the matrix products of sm_90, a warpgroup at a time.
#pragma once
#include "ops_bulk.h"

// Each warp of the warpgroup computes its own 16 rows (16 * (warp % 4) of A) when it issues the instruction; until its
// wait_group the accumulators may only be touched by further wgmma, A fragments not written, operands in shared memory
// not overwritten. A descriptor names 8 x 16-byte core matrices: see chunk().
struct Gmma {
  u32 start, lead, stride, mode;
  bool major_mn;
};
inline Gmma gmma_desc(u64 d, bool mn) {
  if (d >> 49 & 7) throw Fault("wgmma", "matrix descriptors with a base offset are not supported");
  // mode maps the descriptor's layout type to the swizzle, 16 << mode bytes.
  static const u32 mode[] = {0, 3, 2, 1};
  return {(u32)(d & 0x3fff) << 4, (u32)(d >> 16 & 0x3fff) << 4, (u32)(d >> 32 & 0x3fff) << 4, mode[d >> 62], mn};
}
// Gives the address of a 16-byte chunk. K-major: row r, chunk k along K. MN-major: chunk r along M or N, row k along K.
inline u32 chunk(const Gmma& g, u32 r, u32 k) {
  // s counts the chunks in a swizzle row.
  u32 s = 1u << g.mode, off;
  if (!g.major_mn)
    off = r % 8 * 16 * s + r / 8 * g.stride + (g.mode ? k * 16 : k * g.lead);
  else
    off = g.mode ? r % s * 16 + r / s * g.lead + k % 8 * 16 * s + k / 8 * g.stride
                 : r * g.stride + k % 8 * 16 + k / 8 * g.lead;
  return (u32)swizzled(g.start + off, g.mode);
}
template <class F>
void chunk_values(const u8* p, Ty t, F&& put) {
  switch (t) {
    case Ty::f16: {
      u16 h[8];
      std::memcpy(h, p, 16);
      for (int i = 0; i < 8; i++) put(i, f16_to_f32(h[i]));
      break;
    }
    case Ty::bf16: {
      u16 h[8];
      std::memcpy(h, p, 16);
      for (int i = 0; i < 8; i++) put(i, bf16_to_f32(h[i]));
      break;
    }
    case Ty::tf32: {
      u32 h[4];
      std::memcpy(h, p, 16);
      for (int i = 0; i < 4; i++) put(i, bitcast<float>(h[i] & 0xffffe000u));
      break;
    }
    default:
      for (int i = 0; i < 16; i++) put(i, from_fp8(p[i], t));
  }
}
inline void flight_mark(Warp& w, const Inst& in, bool on) {
  u32 nd = in.ndst, na = in.flags & 1 ? 4 : 0;
  if (w.in_flight.size() < w.regs.size() / 8 + 1) w.in_flight.assign(w.regs.size() / 8 + 1, 0);
  for (u32 i = 0; i < nd + na; i++)
    if (!in.op[i].base) w.in_flight[in.op[i].off / 8] = on ? (i < nd ? 1 : 2) : 0;
}
inline void wgmma_h(Warp& w, const Inst& in, u32 m);
inline void wgmma_retire(Warp& w, u64 upto) {
  for (auto& k : w.wgmma) flight_mark(w, *k.in, false);
  while (!w.wgmma.empty() && w.wgmma.front().group < upto) {
    auto& k = w.wgmma.front();
    for (u32 off : k.words) async_done(w, off, 16, k.tag);
    w.wgmma.pop_front();
  }
  for (auto& k : w.wgmma) flight_mark(w, *k.in, true);
}
// This runs before any instruction while a wgmma is in flight.
inline void flight_step(Warp& w, const Inst& in, u32 m) {
  if (m)
    for (u32 i = 0; i < in.nop; i++) {
      if (in.op[i].base) continue;
      u8 f = w.in_flight[in.op[i].off / 8];
      if (!f || (f == 2 && i >= in.ndst) || (f == 1 && in.fn == wgmma_h && i < in.ndst)) continue;
      // ptxas injects a wait here.
      if (!w.lc->opt.wgmma) {
        wgmma_retire(w, ~0ull);
        return;
      }
      throw Fault("wgmma",
                  strf("%s of a register that a wgmma in flight %s (no wgmma.wait_group has covered it)",
                       i < in.ndst ? "write" : "read", f == 1 ? "accumulates into" : "reads its A fragment from"));
    }
}
// Operands are D, A registers or descriptor, B descriptor, scale-d; ty is the type of the operands, sub that of D, elem
// is N / 8; the bits of flags are 1 A in registers, 2 A MN-major, 4 B MN-major, 8 -A, 16 -B.
inline void wgmma_h(Warp& w, const Inst& in, u32 m) {
  if (!gather(w, kFull, m)) return;
  if (w.alive != kFull) throw Fault("wgmma", "wgmma in a warp with exited lanes");
  if (w.cta->warps.size() < (w.id / 4 + 1) * 4) throw Fault("wgmma", "wgmma needs a warpgroup of four warps");
  static thread_local Row8 B[32][32];
  static thread_local double A[16][32];
  const Ty t = in.ty;
  const bool half = (Ty)in.sub == Ty::f16, regs = in.flags & 1;
  const int es = t == Ty::tf32                   ? 4
                 : t == Ty::f16 || t == Ty::bf16 ? 2
                                                 : 1,
            E = 16 / es, K = 2 * E, NB = in.elem, nd = in.ndst, ob = nd + (regs ? 4 : 1), wr0 = 16 * (w.id % 4);
  const u8* smem = w.cta->shared.data() - kSharedBase;
  PcStat& st = stat_of(w);
  Wgmma op{w.wgmma_group, ++w.async_seq & 0x7fffffff, &in, {}};
  u32 bad_rows = 0;
  std::vector<u8> bad_cols(NB * 8, 0);
  u32 bad_off = 0;
  auto desc = [&](const Opnd& o, bool mn) {
    u64 d = rd<u64>(w.ptr(o), 0);
    for (int l = 1; l < kLanes; l++)
      if (rd<u64>(w.ptr(o), l) != d) throw Fault("wgmma", "the matrix descriptor differs between lanes", l);
    return gmma_desc(d, mn);
  };
  auto fetch = [&](const Gmma& g, u32 r, u32 k, bool& bad) {
    u32 a = chunk(g, r, k);
    shared_bounds(w, a, 16, 0);
    u32 off = a - kSharedBase;
    bad = async_read(w, off, 16, op.tag, 0);
    if (bad) bad_off = off;
    op.words.push_back(off);
    return smem + a;
  };
  bool bad;
  // Register r holds rows g + 8 * (r & 1), columns q * e.. + E * (r >> 1).
  if (regs)
    for (int r = 0; r < 4; r++) {
      const u32* p = (const u32*)w.ptr(in.op[nd + r]);
      const int e = 4 / es;
      for (int l = 0; l < kLanes; l++) {
        u8 b[16] = {0};
        std::memcpy(b, p + l, 4);
        chunk_values(b, t, [&](int i, double v) {
          if (i < e) A[(l >> 2) + 8 * (r & 1)][(l & 3) * e + i + E * (r >> 1)] = v;
        });
      }
      for (u32 k = taint_of(w, in.op[nd + r]); k; k &= k - 1) bad_rows |= 1u << ((first(k) >> 2) + 8 * (r & 1));
    }
  else {
    Gmma g = desc(in.op[nd], in.flags & 2);
    if (!g.major_mn)
      for (int r = 0; r < 16; r++)
        for (int c = 0; c < 2; c++) {
          const u8* p = fetch(g, wr0 + r, c, bad);
          bad_rows |= (u32)bad << r;
          chunk_values(p, t, [&](int i, double v) { A[r][c * E + i] = v; });
        }
    else
      for (int k = 0; k < K; k++)
        for (int c = 0; c < 16 / E; c++) {
          const u8* p = fetch(g, wr0 / E + c, k, bad);
          if (bad) bad_rows |= ((1u << E) - 1) << c * E;
          chunk_values(p, t, [&](int i, double v) { A[c * E + i][k] = v; });
        }
    st.wavefronts += 16 * 32 / 128;
    st.wave_ideal += 16 * 32 / 128;
  }
  Gmma g = desc(in.op[ob], in.flags & 4);
  if (!g.major_mn)
    for (int n = 0; n < NB * 8; n++)
      for (int c = 0; c < 2; c++) {
        const u8* p = fetch(g, n, c, bad);
        bad_cols[n] |= bad;
        chunk_values(p, t, [&](int i, double v) { B[c * E + i][n / 8][n % 8] = v; });
      }
  else
    for (int k = 0; k < K; k++)
      for (int c = 0; c < NB * 8 / E; c++) {
        const u8* p = fetch(g, c, k, bad);
        if (bad) std::fill(&bad_cols[c * E], &bad_cols[c * E] + E, 1);
        chunk_values(p, t, [&](int i, double v) { B[k][(c * E + i) / 8][(c * E + i) % 8] = v; });
      }
  // Each warp is charged a quarter of B.
  {
    u32 n = (NB * 8 * 32 / 4 + 127) / 128;
    st.requests++;
    st.bytes += NB * 8 * 32 / 4 + (regs ? 0 : 512);
    st.wavefronts += n;
    st.wave_ideal += n;
  }
  const bool acc = w.pred(in.op[ob + 1]) & 1;
  const double sign = ((in.flags >> 3 ^ in.flags >> 4) & 1) ? -1 : 1;
  bool any_bad = bad_rows;
  for (u8 b : bad_cols) any_bad |= b;
  for (int j = 0; j < NB; j++) {
    Row8 C[16];
    for (int i = 0; i < 16; i++) {
      Row8 s = {0};
      for (int k = 0; k < K; k++) s += A[i][k] * B[k][j];
      C[i] = s * sign;
    }
    for (int r = 0; r < (half ? 2 : 4); r++) {
      const Opnd& o = in.op[(half ? 2 : 4) * j + r];
      u32* p = (u32*)w.ptr(o);
      u32 tl = 0;
      for (int l = 0; l < kLanes; l++) {
        int row = (l >> 2) + 8 * (half ? r : r >> 1), q = 2 * (l & 3);
        if (half) {
          double x = C[row][q], y = C[row][q + 1];
          if (acc) {
            x += f16_to_f32((u16)p[l]);
            y += f16_to_f32((u16)(p[l] >> 16));
          }
          p[l] = f64_to_f16(x) | (u32)f64_to_f16(y) << 16;
        } else {
          double x = C[row][q + (r & 1)];
          if (acc) x += bitcast<float>(p[l]);
          p[l] = bitcast<u32>((float)x);
        }
        if (any_bad)
          tl |= (u32)((bad_rows >> row & 1) || bad_cols[8 * j + q + (half ? 0 : r & 1)] ||
                      (half && bad_cols[8 * j + q + 1]))
                << l;
      }
      if (!acc && !w.taint.empty()) w.taint.erase(o.off);
      if (tl) {
        Taint x{tl | taint_of(w, o), w.pc, bad_off};
        w.taint[o.off] = x;
      }
    }
  }
  std::sort(op.words.begin(), op.words.end());
  op.words.erase(std::unique(op.words.begin(), op.words.end()), op.words.end());
  flight_mark(w, in, true);
  progress(w);
  w.wgmma.push_back(std::move(op));
}
inline void wgmma_commit_h(Warp& w, const Inst&, u32 m) {
  if (gather(w, kFull, m)) w.wgmma_group++;
}
inline void wgmma_wait_h(Warp& w, const Inst& in, u32 m) {
  if (!gather(w, kFull, m)) return;
  wgmma_retire(w, w.wgmma_group > (u64)in.imm ? w.wgmma_group - in.imm : 0);
}
inline void warp_sync_nop_h(Warp& w, const Inst&, u32 m) { gather(w, kFull, m); }
inline void decode_wgmma(Dec& d) {
  bool fence = d.take("fence"), commit = d.take("commit_group"), wait = d.take("wait_group");
  d.take("sync");
  d.take("aligned");
  if (fence) {
    d.emit(warp_sync_nop_h, Cls::fence);
    return;
  }
  if (commit) {
    d.emit(wgmma_commit_h, Cls::other);
    return;
  }
  if (wait) {
    d.in.imm = (i64)d.pop().bits;
    d.emit(wgmma_wait_h, Cls::other);
    return;
  }
  if (!d.take("mma_async") || d.take("sp")) d.fail("unsupported wgmma");
  int n = 0, k = 0;
  for (size_t i = 0; i < d.mods.size(); i++)
    if (std::sscanf(d.mods[i].c_str(), "m64n%dk%d", &n, &k) == 2) d.used[i] = true;
  auto ty = [&] {
    if (d.take("e4m3")) return Ty::e4m3x2;
    if (d.take("e5m2")) return Ty::e5m2x2;
    return d.type();
  };
  Ty td = d.type(), ta = ty(), tb = ty();
  int es = ta == Ty::tf32 ? 4 : ta == Ty::f16 || ta == Ty::bf16 ? 2 : ta == Ty::e4m3x2 || ta == Ty::e5m2x2 ? 1 : 0;
  if (n < 8 || n > 256 || n % 8 || !es || k * es != 32 || ta != tb || (td != Ty::f32 && td != Ty::f16))
    d.fail("unsupported wgmma shape or types");
  // flops counts a warp's quarter.
  d.in.ty = ta;
  d.in.sub = (u8)td;
  d.in.elem = (u8)(n / 8);
  d.in.flops = 2.0f * 16 * n * k;
  d.dst(Ty::b32);
  if (d.in.ndst != (td == Ty::f16 ? n / 4 : n / 2)) d.fail("wrong number of accumulator registers");
  bool regs = d.raw(d.next).k == RawOp::vec;
  size_t before = d.ops.size();
  d.src(regs ? Ty::b32 : Ty::b64);
  if (regs) {
    d.in.flags |= 1;
    if (d.ops.size() != before + 4) d.fail("wrong number of A registers");
  }
  d.src(Ty::b64);
  d.src(Ty::pred);
  auto imm = [&] {
    const RawOp& r = d.pop();
    if (r.k != RawOp::integer) d.fail("expected an immediate");
    return (i64)r.bits;
  };
  if (d.more()) {
    if (imm() == -1) d.in.flags |= 8;
    if (imm() == -1) d.in.flags |= 16;
  }
  if (d.more() && !regs && imm()) d.in.flags |= 2;
  if (d.more() && imm()) d.in.flags |= 4;
  if (es != 2 && (d.in.flags & 6)) d.fail("only 16-bit operands can be transposed");
  d.emit(wgmma_h, Cls::mma);
}
