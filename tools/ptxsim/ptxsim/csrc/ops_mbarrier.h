// mbarriers of sm_90. Asynchronous work completes as late as it may:
// a bulk load when a warp polls its mbarrier for the second time (the first poll of each warp fails), a bulk store when
// its group is waited for, so that missing waits are seen.
#pragma once
#include "ops_control.h"

// Dec::address leaves operand pairs (base, constant offset).
inline u64 lane_value(Warp& w, const Opnd& o, int l) {
  return o.width == 8 ? rd<u64>(w.ptr(o), l) : rd<u32>(w.ptr(o), l);
}
inline u64 lane_addr(Warp& w, const Inst& in, int i, int l) {
  u64 a = lane_value(w, in.op[i], l) + lane_value(w, in.op[i + 1], l);
  return in.op[i].width == 8 ? a : (u32)a;
}
inline void push_addr(Dec& d, const RawOp& r) {
  d.address(r);
  int w = d.ops.back().width == 8 ? 8 : 4;
  d.ops.push_back(d.lo.constant(w == 8 ? (u64)d.in.imm : (u32)d.in.imm, w));
  d.in.imm = 0;
}
inline u32 shared_offset(Warp& w, u64 a, u32 bytes, u32 align, int l) {
  a &= ~kWindowMask;
  if (a & (align - 1))
    throw Fault("misaligned",
                strf("shared address 0x%llx of an asynchronous copy or mbarrier is not %u-byte aligned",
                     (unsigned long long)a, align),
                l);
  shared_bounds(w, a, bytes, l);
  return (u32)a - kSharedBase;
}

inline MBar& mbar_at(Warp& w, u64 a, int l) {
  u32 off = shared_offset(w, a, 8, 8, l);
  auto f = w.cta->mbars.find(off);
  if (f == w.cta->mbars.end())
    throw Fault("mbarrier", strf("no mbarrier has been initialised at shared byte offset %u", off), l);
  // The access is ordered after the initialisation.
  shadow_access(w, off, 8, Use::read, l);
  return f->second;
}
inline void mbar_settle(Warp& w, MBar& b) {
  if (b.pending || b.tx) return;
  b.phase++;
  b.polled = 0;
  b.pending = b.count;
  b.done = b.acc;
  std::fill(b.acc.begin(), b.acc.end(), 0);
  progress(w);
}
// Modes 1, 2 and 3 swizzle 32, 64 and 128 bytes.
inline u64 swizzled(u64 a, u32 mode) { return mode ? a ^ (a >> 3 & ((1u << mode) - 1) << 4) : a; }
// The bulk loads that signal this mbarrier complete.
inline void mbar_land(Warp& w, MBar& b) {
  Cta& c = *w.cta;
  u32 nw = (u32)c.warps.size();
  for (auto& k : b.loads) {
    u8* s = c.shared.data() - kSharedBase;
    u32 n = (u32)k.data.size(), at = k.dst + kSharedBase;
    for (u32 i = 0; i < n; i += 16) std::memcpy(s + swizzled(at + i, k.swizzle), &k.data[i], 16);
    c.agent++;
    for (u32 i = k.dst / 4; i < (k.dst + n) / 4; i++) {
      Shadow& h = c.shadow[i];
      h.pend = 0;
      h.init = 15;
      h.wclock = c.agent;
      h.wwarp = (u8)nw;
      h.wbytes = 15;
      h.atomic = h.generic = 0;
      h.rmask = 0;
      h.rbytes = 0;
    }
    b.tx -= n;
    b.acc[nw] = c.agent;
    progress(w);
  }
  b.loads.clear();
  mbar_settle(w, b);
}
// Operands are the address and the count; sub is 0 for init, 1 for inval.
inline void mbar_init_h(Warp& w, const Inst& in, u32 m) {
  for (; m; m &= m - 1) {
    int l = first(m);
    u32 off = shared_offset(w, lane_addr(w, in, 0, l), 8, 8, l);
    Cta& c = *w.cta;
    w.overwrites.clear();
    shadow_access(w, off, 8, Use::write, l);
    if (in.sub) {
      auto f = c.mbars.find(off);
      if (f == c.mbars.end()) throw Fault("mbarrier", "mbarrier.inval of something that is no mbarrier", l);
      if (!f->second.loads.empty())
        throw Fault("mbarrier", "mbarrier.inval while bulk copies that signal it are in flight", l);
      c.mbars.erase(f);
      continue;
    }
    MBar b;
    b.count = b.pending = (u32)lane_value(w, in.op[2], l);
    b.acc = b.done = std::vector<u32>(c.vc[0].size(), 0);
    if (!b.count || b.count >= 1u << 20) throw Fault("mbarrier", strf("bad mbarrier count %u", b.count), l);
    if (c.mbars.count(off)) {
      auto& o = c.mbars[off];
      if (!o.loads.empty())
        throw Fault("mbarrier", "mbarrier.init over an mbarrier that bulk copies in flight signal", l);
    }
    c.mbars[off] = b;
  }
  progress(w);
}
// Operands are [state], address, arrivals, bytes; the bits of sub are 1 arrive, 2 expect_tx, 4 complete_tx, 8 drop; vec
// says that there is a state.
inline void mbar_arrive_h(Warp& w, const Inst& in, u32 m) {
  for (; m; m &= m - 1) {
    int l = first(m), o = in.vec;
    MBar& b = mbar_at(w, lane_addr(w, in, o, l), l);
    auto& vc = w.cta->vc[w.id];
    u32 n = (u32)lane_value(w, in.op[o + 2], l);
    i64 tx = (i64)lane_value(w, in.op[o + 3], l);
    if (in.vec) wr<u64>(w.ptr(in.op[0]), l, b.phase);
    b.tx += in.sub & 2 ? tx : in.sub & 4 ? -tx : 0;
    if (in.sub & 1) {
      if (n > b.pending)
        throw Fault("mbarrier", strf("more arrivals than the mbarrier expects (%u pending, %u arrive)", b.pending, n),
                    l);
      if (w.lc->opt.races) vc_join(b.acc, vc);
      b.pending -= n;
      if (in.sub & 8) b.count -= n;
    }
    mbar_settle(w, b);
  }
  w.cta->vc[w.id][w.id]++;
  progress(w);
}
// Operands are the predicate, the address, and the parity or state; sub is 1 for parity.
inline void mbar_wait_h(Warp& w, const Inst& in, u32 m) {
  u32 ok = 0, now = 0;
  Cta& c = *w.cta;
  std::vector<MBar*> late;
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    MBar& b = mbar_at(w, lane_addr(w, in, 1, l), l);
    if (!b.loads.empty()) {
      if (b.polled >> w.id & 1)
        mbar_land(w, b);
      else
        now |= 1u << w.id, late.push_back(&b);
    }
    u64 v = lane_value(w, in.op[3], l);
    bool done = in.sub ? (b.phase & 1) != (v & 1) : b.phase > v;
    if (done) {
      ok |= 1u << l;
      if (c.lc->opt.races) vc_join(c.vc[w.id], b.done);
    }
  }
  for (auto b : late) b->polled |= now;
  w.set_pred(in.op[0], m, ok);
  if (ok != m) {
    w.lc->polls++;
    w.yield = true;
  }
}
inline void decode_mbarrier(Dec& d) {
  auto space = [&] {
    d.take("shared") || d.take("shared::cta") || d.take("shared::cluster");
    for (auto s : {"release", "acquire", "relaxed", "cta", "cluster"}) d.take(s);
    if (!d.take("b64")) d.fail("missing .b64");
  };
  if (d.take("init") || d.take("inval")) {
    d.in.sub = d.s.text.find(".inval") != std::string::npos;
    space();
    push_addr(d, d.pop());
    if (!d.in.sub) d.src(Ty::u32);
    d.emit(mbar_init_h, Cls::mbarrier);
    return;
  }
  bool test = d.take("test_wait"), tr = d.take("try_wait");
  if (test || tr) {
    d.in.sub = d.take("parity");
    space();
    d.dst(Ty::pred);
    push_addr(d, d.pop());
    d.src(d.in.sub ? Ty::u32 : Ty::b64);
    // The next operand is a time limit.
    if (d.more()) d.next++;
    d.emit(mbar_wait_h, Cls::mbarrier);
    return;
  }
  bool arrive = d.take("arrive"), drop = d.take("arrive_drop"), expect = d.take("expect_tx"),
       complete = d.take("complete_tx");
  if (d.take("noComplete") || !(arrive || drop || expect || complete)) d.fail("unsupported mbarrier operation");
  space();
  d.in.sub = (u8)((arrive || drop) | expect << 1 | complete << 2 | drop << 3);
  if ((arrive || drop) && d.raw(0).k == RawOp::name) {
    if (d.raw(0).text == "_")
      d.next++;
    else {
      d.dst(Ty::b64);
      d.in.vec = 1;
    }
  }
  if (!d.in.ndst) d.in.vec = 0;
  push_addr(d, d.pop());
  Opnd n = d.lo.constant(1, 4), tx = d.lo.constant(0, 4);
  if (d.more()) (expect || complete ? tx : n) = d.value(d.pop(), Ty::u32);
  d.ops.push_back(n);
  d.ops.push_back(tx);
  d.emit(mbar_arrive_h, Cls::mbarrier);
}
