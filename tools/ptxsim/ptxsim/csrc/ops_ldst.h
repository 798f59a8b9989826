// Loads and stores move elements between memory and registers, and follow bytes that were never written.
#pragma once
#include "access.h"
#include "ops_cvt.h"

// Loading bytes never written is not yet an error: pipelines prefetch past their end, and GEMMs multiply
// rows they will not store. The taint follows values through registers, mma (by row and column) and
// shared memory; it is an error where it reaches global memory, an atomic, an address or a branch.
inline u32 taint_of(const Warp& w, const Opnd& o) {
  if (o.base) return 0;
  auto f = w.taint.find(o.off);
  return f == w.taint.end() ? 0 : f->second.lanes;
}
inline void taint_load(Warp& w, const Opnd& o, u32 lanes) {
  if (lanes) w.taint[o.off] = {lanes, w.pc, w.uninit_off};
}
inline bool is_sink(const Inst& in) {
  switch (in.cls) {
    case Cls::st_global:
    case Cls::atom_global:
    case Cls::atom_shared:
    case Cls::cp_async:
    case Cls::control:
    case Cls::ld_global:
    case Cls::ld_shared:
    case Cls::ldmatrix:
      return true;
    default:
      return false;
  }
}
// This runs before an instruction of a warp that holds tainted registers.
inline void taint_step(Warp& w, const Inst& in, u32 m) {
  auto use = [&](const Opnd& o) -> const Taint* {
    if (o.base) return nullptr;
    auto f = w.taint.find(o.off);
    return f != w.taint.end() && (f->second.lanes & m) ? &f->second : nullptr;
  };
  auto bad = [&](const Taint& t) {
    const Inst& ld = w.lc->k->code[t.pc];
    throw Fault("uninitialised",
                strf("use of uninitialised shared memory: loaded from byte offset %u by '%s' at PTX line %d", t.off,
                     w.lc->k->op_text[t.pc].c_str(), ld.line),
                first(t.lanes & m));
  };
  if (in.guarded) {
    u32 act = w.active;
    auto f = w.taint.find(in.guard.off);
    if (f != w.taint.end() && (f->second.lanes & act)) {
      m = act;
      bad(f->second);
    }
  }
  if (!m) return;
  // These instructions look after their data themselves.
  if (in.cls == Cls::mma || in.cls == Cls::st_shared || in.cls == Cls::stmatrix) {
    if (in.cls != Cls::mma)
      if (auto t = use(in.op[0])) bad(*t);
    return;
  }
  const Taint* t = nullptr;
  for (u32 i = in.ndst; i < in.nop && !t; i++) t = use(in.op[i]);
  if (t && is_sink(in)) bad(*t);
  // The destinations inherit this taint.
  Taint from{0, 0, 0};
  if (t) {
    from = *t;
    from.lanes = in.cls == Cls::shuffle ? m : from.lanes & m;
  }
  for (u32 i = 0; i < in.ndst; i++) {
    auto f = w.taint.find(in.op[i].off);
    u32 keep = f == w.taint.end() ? 0 : f->second.lanes & ~m;
    if (from.lanes) {
      Taint n = from;
      n.lanes |= keep;
      w.taint[in.op[i].off] = n;
    } else if (f != w.taint.end()) {
      if (keep)
        f->second.lanes = keep;
      else
        w.taint.erase(f);
    }
  }
}

// These two move one element between memory and a register slot.
inline void load_elem(void* slot, const Opnd& o, int l, const u8* p, u32 bytes, bool sign) {
  u64 v = 0;
  switch (bytes) {
    case 1:
      v = sign ? (u64)(i64)(i8)*p : *p;
      break;
    case 2: {
      u16 x;
      std::memcpy(&x, p, 2);
      v = sign ? (u64)(i64)(i16)x : x;
      break;
    }
    case 4: {
      u32 x;
      std::memcpy(&x, p, 4);
      v = sign ? (u64)(i64)(i32)x : x;
      break;
    }
    case 8:
      std::memcpy(&v, p, 8);
      break;
    default:
      std::memcpy((u8*)slot + 16 * l, p, 16);
      return;
  }
  if (o.width == 8)
    ((u64*)slot)[l] = v;
  else
    ((u32*)slot)[l] = (u32)v;
}
inline void store_elem(const void* slot, const Opnd& o, int l, u8* p, u32 bytes) {
  if (o.width == 8 && bytes < 8) {
    std::memcpy(p, (const u64*)slot + l, bytes);
    return;
  }
  switch (bytes) {
    case 1:
      *p = (u8)((const u32*)slot)[l];
      break;
    case 2: {
      u16 x = (u16)((const u32*)slot)[l];
      std::memcpy(p, &x, 2);
      break;
    }
    case 4:
      std::memcpy(p, (const u32*)slot + l, 4);
      break;
    case 8:
      std::memcpy(p, (const u64*)slot + l, 8);
      break;
    default:
      std::memcpy(p, (const u8*)slot + 16 * l, 16);
  }
}
template <class P>
inline void load_lanes(Warp& w, const Inst& in, u32 m, P&& ptr) {
  bool sign = is_signed(in.ty);
  for (int v = 0; v < in.vec; v++) {
    const Opnd& o = in.op[v];
    void* slot = w.ptr(o);
    if (in.elem == 4 && o.width <= 4) {
      for (u32 k = m; k; k &= k - 1) {
        int l = first(k);
        std::memcpy((u32*)slot + l, ptr(l) + 4 * v, 4);
      }
      continue;
    }
    for (u32 k = m; k; k &= k - 1) {
      int l = first(k);
      load_elem(slot, o, l, ptr(l) + v * in.elem, in.elem, sign);
    }
  }
}
// Operands are the destinations (vec of them) and the address.
inline void ld_h(Warp& w, const Inst& in, u32 m) {
  Addrs a;
  effective(w, in.op[in.vec], in.imm, m, a);
  u32 bytes = in.elem * in.vec;
  if (in.flags & kPoll) w.lc->polls++;
  w.uninit = 0;
  each_space(w, in.space, a, m, [&](Space s, u32 g) {
    switch (s) {
      case Space::global:
        global_access(w, a, g, bytes, false);
        load_lanes(w, in, g, [&](int l) { return (const u8*)a.a[l]; });
        break;
      case Space::shared:
        shared_access(w, a, g, bytes, Use::read, in.flags);
        load_lanes(w, in, g, [&](int l) { return (const u8*)shared_ptr(w, a.a[l]); });
        break;
      case Space::local:
        stat_of(w).bytes += bytes * __builtin_popcount(g);
        load_lanes(w, in, g, [&](int l) { return (const u8*)local_ptr(w, a.a[l], bytes, l); });
        break;
      default:
        load_lanes(w, in, g, [&](int l) { return param_ptr(w, a.a[l], bytes, l); });
    }
  });
  if (w.uninit)
    for (int v = 0; v < in.vec; v++) taint_load(w, in.op[v], w.uninit);
  if (in.flags & kAcqRel) w.cta->acquired = ++w.lc->seq;
}
// Operands are the address and the sources.
inline void st_h(Warp& w, const Inst& in, u32 m) {
  Addrs a;
  effective(w, in.op[0], in.imm, m, a);
  u32 bytes = in.elem * in.vec;
  auto put = [&](u32 g, auto&& ptr) {
    bool change = false;
    for (u32 k = g; k; k &= k - 1) {
      int l = first(k);
      u8* p = ptr(l);
      u8 old[32];
      std::memcpy(old, p, bytes);
      for (int v = 0; v < in.vec; v++) store_elem(w.ptr(in.op[1 + v]), in.op[1 + v], l, p + v * in.elem, in.elem);
      bool differs = std::memcmp(old, p, bytes) != 0;
      change |= differs;
      if (!w.overwrites.empty()) check_overwrite(w, l, differs);
    }
    if (change) progress(w);
  };
  each_space(w, in.space, a, m, [&](Space s, u32 g) {
    w.overwrites.clear();
    switch (s) {
      case Space::global:
        global_access(w, a, g, bytes, true);
        if (w.lc->opt.global_races && !(in.flags & (kVolatile | kAcqRel | kPoll)))
          for (u32 k = g; k; k &= k - 1) global_store_race(w, a.a[first(k)], bytes, first(k));
        put(g, [&](int l) { return (u8*)a.a[l]; });
        break;
      case Space::shared:
        shared_access(w, a, g, bytes, Use::write, in.flags);
        put(g, [&](int l) { return shared_ptr(w, a.a[l]); });
        if (!w.taint.empty())
          for (int v = 0; v < in.vec; v++)
            for (u32 k = taint_of(w, in.op[1 + v]) & g; k; k &= k - 1)
              shadow_forget(w, (u32)a.a[first(k)] - kSharedBase + v * in.elem, in.elem);
        break;
      case Space::local:
        stat_of(w).bytes += bytes * __builtin_popcount(g);
        put(g, [&](int l) { return local_ptr(w, a.a[l], bytes, l); });
        break;
      default:
        throw Fault("write-to-param", "store to .param space", first(g));
    }
  });
}
// Takes semantics, scopes and cache hints.
inline void memory_mods(Dec& d) {
  if (d.take("volatile")) d.in.flags |= kVolatile | kPoll;
  if (d.take("relaxed") || d.take("mmio")) d.in.flags |= kVolatile | kPoll;
  if (d.take("acquire") || d.take("release") || d.take("acq_rel")) d.in.flags |= kAcqRel | kPoll;
  for (auto s : {"weak", "cta", "cluster", "gpu", "sys", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"}) d.take(s);
  d.take_prefix("L1::");
  d.take_prefix("L2::evict");
  d.take_prefix("L2::");
  d.take_prefix("L2::cache_hint");
}
inline int take_vec(Dec& d) { return d.take("v2") ? 2 : d.take("v4") ? 4 : d.take("v8") ? 8 : 1; }
inline Cls mem_cls(Space s, bool st) {
  switch (s) {
    case Space::shared:
      return st ? Cls::st_shared : Cls::ld_shared;
    case Space::local:
      return st ? Cls::st_local : Cls::ld_local;
    case Space::param:
    case Space::cnst:
      return Cls::ld_param;
    default:
      return st ? Cls::st_global : Cls::ld_global;
  }
}
// The .param space of a call is local memory.
inline void settle_space(Dec& d) {
  if (d.in.space == Space::param && d.addr_sym && d.addr_sym->k == Sym::local) d.in.space = Space::local;
}
inline void decode_ld(Dec& d) {
  d.in.space = d.space();
  memory_mods(d);
  d.in.vec = (u8)take_vec(d);
  Ty t = d.type();
  d.in.ty = t;
  d.in.elem = (u8)size_of(t);
  d.dst(t);
  if (d.ops.size() != d.in.vec) d.fail("wrong vector length");
  d.address();
  settle_space(d);
  // The next operand is a cache policy.
  if (d.more()) d.next++;
  bool param_copy = d.in.space == Space::local && d.s.text.find("param") != std::string::npos;
  d.emit(ld_h, param_copy ? Cls::ld_param : mem_cls(d.in.space, false));
}
inline void decode_st(Dec& d) {
  d.in.space = d.space();
  memory_mods(d);
  d.take("async");
  d.in.vec = (u8)take_vec(d);
  Ty t = d.type();
  d.in.ty = t;
  d.in.elem = (u8)size_of(t);
  d.address();
  settle_space(d);
  d.src(t);
  if (d.ops.size() != 1u + d.in.vec) d.fail("wrong vector length");
  if (d.more()) d.next++;
  bool param_copy = d.in.space == Space::local && d.s.text.find("param") != std::string::npos;
  d.emit(st_h, param_copy ? Cls::ld_param : mem_cls(d.in.space, true));
}
