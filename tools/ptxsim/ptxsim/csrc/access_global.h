// This file finds the effective addresses of a warp's lanes, and global accesses: bounds, alignment, traffic and races
// between CTAs.
#pragma once
#include "lanes.h"
#include "machine.h"

struct Addrs {
  alignas(64) u64 a[kLanes];
};

inline PcStat& stat_of(Warp& w) { return w.lc->stat[w.pc]; }
inline void progress(Warp& w) {
  w.lc->progress_at = w.lc->clock;
  w.lc->polls = 0;
}

// op[i] is the base register (or constant), imm the offset that is added to it.
inline void effective(const Warp& w, const Opnd& o, i64 imm, u32 m, Addrs& out) {
  const void* p = w.ptr(o);
  if (o.width == 8)
    lanes(m, [&](int l) { out.a[l] = ((const u64*)p)[l] + imm; });
  else
    lanes(m, [&](int l) { out.a[l] = (u32)(((const u32*)p)[l] + (u32)imm); });
}
inline int first(u32 m) { return __builtin_ctz(m); }

inline void check_align(const Addrs& a, u32 m, u32 bytes, const char* space) {
  u64 bad = 0;
  lanes(m, [&](int l) { bad |= a.a[l]; });
  if (!(bad & (bytes - 1))) return;
  for (; m; m &= m - 1) {
    int l = first(m);
    if (a.a[l] & (bytes - 1))
      throw Fault("misaligned",
                  strf("misaligned %s access of %u bytes at 0x%llx", space, bytes, (unsigned long long)a.a[l]), l);
  }
}

[[noreturn]] inline void oob_global(Warp& w, u64 a, u32 bytes, int l) {
  std::string near;
  Alloc* best = nullptr;
  i64 dist = INT64_MAX;
  for (Alloc* p : w.lc->allocs) {
    i64 d = a < p->lo ? (i64)(p->lo - a) : (i64)(a - p->hi);
    if (std::abs(d) < dist) dist = std::abs(d), best = p;
  }
  if (best)
    near = strf("; nearest is '%s' (%llu bytes), at byte offset %lld", best->name.c_str(),
                (unsigned long long)(best->hi - best->lo), (long long)(a - best->lo));
  throw Fault("out-of-bounds",
              strf("out-of-bounds global access of %u bytes at 0x%llx%s", bytes, (unsigned long long)a, near.c_str()),
              l);
}
inline Alloc* locate(Warp& w, u64 a, u32 bytes, int l) {
  Alloc* h = w.hit;
  if (!h || a < h->lo || a >= h->hi) {
    h = w.lc->find(a);
    if (!h) oob_global(w, a, bytes, l);
    w.hit = h;
  }
  if (a + bytes > h->hi) oob_global(w, a, bytes, l);
  return h;
}
// Checks bounds and alignment of one warp-wide global access and counts it.
inline void global_access(Warp& w, const Addrs& a, u32 m, u32 bytes, bool write, bool count = true) {
  check_align(a, m, bytes, "global");
  u64 lo = ~0ull, hi = 0;
  if (m == kFull)
    for (int l = 0; l < kLanes; l++) {
      lo = std::min(lo, a.a[l]);
      hi = std::max(hi, a.a[l]);
    }
  else
    for (u32 k = m; k; k &= k - 1) {
      u64 x = a.a[first(k)];
      lo = std::min(lo, x);
      hi = std::max(hi, x);
    }
  Alloc* h = locate(w, lo, bytes, 0 + first(m));
  bool one = hi + bytes <= h->hi;
  if (!one)
    for (u32 k = m; k; k &= k - 1) locate(w, a.a[first(k)], bytes, first(k));
  if (!count) return;
  PcStat& st = stat_of(w);
  st.requests++;
  st.bytes += (u64)bytes * __builtin_popcount(m);
  auto count_sectors = [&](Alloc* h, u32 k) {
    u64 sect[kLanes];
    int n = 0;
    bool sorted = true;
    for (; k; k &= k - 1) {
      u64 s = h->sector(a.a[first(k)]);
      if (n && sect[n - 1] == s) continue;
      if (n && s < sect[n - 1]) sorted = false;
      sect[n++] = s;
    }
    if (!sorted) {
      std::sort(sect, sect + n);
      n = (int)(std::unique(sect, sect + n) - sect);
    }
    st.sectors += n;
    for (int i = 0; i < n; i++) h->touch(write ? h->wr : h->rd, sect[i]);
  };
  if (one) {
    count_sectors(h, m);
    return;
  }
  // One access may span several allocations.
  while (m) {
    Alloc* p = locate(w, a.a[first(m)], bytes, first(m));
    u32 g = 0;
    for (u32 k = m; k; k &= k - 1) {
      u64 x = a.a[first(k)];
      if (x >= p->lo && x < p->hi) g |= 1u << first(k);
    }
    count_sectors(p, g);
    m &= ~g;
  }
}
// This optional check reports plain stores of two CTAs to one word with no atomic, acquire or fence in between.
inline void global_store_race(Warp& w, u64 addr, u32 bytes, int l) {
  Alloc* h = locate(w, addr, bytes, l);
  if (h->store.empty()) h->store.resize((h->hi - h->lo + 3) / 4 + 1);
  for (u64 i = (addr - h->lo) / 4; i <= (addr - h->lo + bytes - 1) / 4; i++) {
    auto& s = h->store[i];
    if (s.first && s.first != w.cta->linear + 1 && s.second >= w.cta->acquired)
      throw Fault("global-race",
                  strf("global-memory race: CTAs %u and %u both store to '%s' + %llu with no synchronisation",
                       s.first - 1, w.cta->linear, h->name.c_str(), (unsigned long long)(i * 4)),
                  l);
    s = {w.cta->linear + 1, ++w.lc->seq};
  }
}
