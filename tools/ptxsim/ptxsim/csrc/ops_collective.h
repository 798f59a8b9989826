// Shuffles, votes and other instructions run here once all lanes that they name have arrived.
#pragma once
#include "ops_mem.h"

// A .sync instruction needs every non-exited lane of `members`: true if they are all here.
// Otherwise the lanes present are parked until the others arrive.
inline bool gather(Warp& w, u32 members, u32& m) {
  u32 need = members & w.alive;
  if (!(need & ~m)) return true;
  u32 same = 0;
  for (u32 k = w.parked; k; k &= k - 1) {
    int l = first(k);
    if (w.lane_pc[l] == w.pc) same |= 1u << l;
  }
  if (!(need & ~(m | same))) {
    w.parked &= ~same;
    w.blocked &= ~same;
    w.active |= same;
    m |= same;
    return true;
  }
  w.block(m, w.pc);
  w.parked |= m;
  return false;
}
inline bool gather_op(Warp& w, const Opnd& mask, u32& m) {
  const void* p = w.ptr(mask);
  u32 need = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    u32 mm = rd<u32>(p, l);
    if (!(mm >> l & 1))
      throw Fault("membermask", strf("membermask 0x%08x does not name the executing lane %d", mm, l), l);
    need |= mm;
  }
  return gather(w, need, m);
}
// shfl takes d, p, a, b, c, mask; sub is the mode.
inline void shfl_h(Warp& w, const Inst& in, u32 m) {
  if (!gather_op(w, in.op[5], m)) return;
  u32 a[kLanes];
  std::memcpy(a, w.ptr(in.op[2]), sizeof a);
  const void *bp = w.ptr(in.op[3]), *cp = w.ptr(in.op[4]);
  void* d = w.ptr(in.op[0]);
  u32 ok = 0;
  lanes(m, [&](int l) {
    u32 b = rd<u32>(bp, l) & 31, c = rd<u32>(cp, l), seg = c >> 8 & 31, cv = c & 31;
    int mx = (int)((l & seg) | (cv & ~seg)), mn = l & (int)seg, j;
    bool p;
    switch (in.sub) {
      case 0:
        j = l - (int)b;
        p = j >= mx;
        break;
      case 1:
        j = l + (int)b;
        p = j <= mx;
        break;
      case 2:
        j = l ^ (int)b;
        p = j <= mx;
        break;
      default:
        j = mn | (int)(b & ~seg);
        p = j <= mx;
    }
    if (!p) j = l;
    ok |= (u32)p << l;
    ((u32*)d)[l] = a[j & 31];
  });
  w.set_pred(in.op[1], m, ok);
}
inline u32 members_of(Warp& w, const Opnd& mask, u32 m, int l) { return rd<u32>(w.ptr(mask), l) & m; }
// vote takes d (pred or b32), a (pred), mask; sub is 0 all, 1 any, 2 uni, 3 ballot.
inline void vote_h(Warp& w, const Inst& in, u32 m) {
  if (!gather_op(w, in.op[2], m)) return;
  u32 v = w.pred(in.op[1]), r = 0;
  u32 out[kLanes];
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    u32 g = members_of(w, in.op[2], m, l), on = v & g;
    out[l] = on;
    r |= (u32)(in.sub == 0 ? on == g : in.sub == 1 ? on != 0 : on == g || !on) << l;
  }
  if (in.sub == 3)
    lanes(m, [&](int l) { wr<u32>(w.ptr(in.op[0]), l, out[l]); });
  else
    w.set_pred(in.op[0], m, r);
}
// match takes d, p, a, mask; sub is 0 any, 1 all.
template <class T>
void match_h(Warp& w, const Inst& in, u32 m) {
  if (!gather_op(w, in.op[3], m)) return;
  const void* a = w.ptr(in.op[2]);
  u32 out[kLanes] = {0}, p = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    u32 g = members_of(w, in.op[3], m, l), eq = 0;
    for (u32 q = g; q; q &= q - 1)
      if (rd<T>(a, first(q)) == rd<T>(a, l)) eq |= 1u << first(q);
    out[l] = in.sub ? (eq == g ? g : 0) : eq;
    p |= (u32)(eq == g) << l;
  }
  lanes(m, [&](int l) { wr<u32>(w.ptr(in.op[0]), l, out[l]); });
  w.set_pred(in.op[1], m, p);
}
// redux takes d, a, mask; sub is the At operation.
inline void redux_h(Warp& w, const Inst& in, u32 m) {
  if (!gather_op(w, in.op[2], m)) return;
  u32 a[kLanes];
  std::memcpy(a, w.ptr(in.op[1]), sizeof a);
  u32 out[kLanes];
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    u32 g = members_of(w, in.op[2], m, l);
    u64 r = a[first(g)];
    for (u32 q = g & (g - 1); q; q &= q - 1) r = (u32)atom_apply((At)in.sub, in.ty, r, a[first(q)], 0);
    out[l] = (u32)r;
  }
  lanes(m, [&](int l) { wr<u32>(w.ptr(in.op[0]), l, out[l]); });
}
inline void activemask_h(Warp& w, const Inst& in, u32 m) {
  lanes(m, [&](int l) { wr<u32>(w.ptr(in.op[0]), l, m); });
}
// elect takes d, p, mask.
inline void elect_h(Warp& w, const Inst& in, u32 m) {
  if (!gather_op(w, in.op[2], m)) return;
  u32 lead = (u32)first(m);
  lanes(m, [&](int l) { wr<u32>(w.ptr(in.op[0]), l, lead); });
  w.set_pred(in.op[1], m, 1u << lead);
}
