// Shared accesses are checked for bounds, races, initialisation and proxies, and their wavefronts are counted.
#pragma once
#include "access_global.h"

// Wavefronts: lanes are served in groups (32 lanes for <=4 bytes, 16 for 8, 8 for 16); in each, a
// bank (4 bytes wide, 32 of them) delivers one distinct word per wavefront.
inline void shared_waves(Warp& w, const Addrs& a, u32 m, u32 bytes) {
  PcStat& st = stat_of(w);
  st.requests++;
  st.bytes += (u64)bytes * __builtin_popcount(m);
  u32 words = std::max(1u, bytes / 4), group = kLanes / words;
  for (int g = 0; g < kLanes; g += group) {
    u32 gm = group == 32 ? m : (m >> g) & ((1u << group) - 1);
    if (!gm) continue;
    u32 seen[32][8];
    u8 n[32] = {0};
    u32 worst = 1;
    for (; gm; gm &= gm - 1) {
      u32 word = (u32)a.a[g + first(gm)] >> 2;
      for (u32 j = 0; j < words; j++, word++) {
        u32 b = word & 31;
        bool dup = false;
        u32 lim = std::min<u32>(n[b], 8);
        for (u32 q = 0; q < lim; q++) dup |= seen[b][q] == word;
        if (dup) continue;
        if (n[b] < 8) seen[b][n[b]] = word;
        worst = std::max<u32>(worst, ++n[b]);
      }
    }
    st.wavefronts += worst;
    st.wave_ideal++;
  }
}
inline void shared_bounds(Warp& w, u64 a, u32 bytes, int l) {
  if (a < kSharedBase || a + bytes > kSharedBase + (u64)w.lc->shared_bytes)
    throw Fault("out-of-bounds",
                strf("out-of-bounds shared access of %u bytes at offset %lld (the CTA has %u bytes)", bytes,
                     (long long)(a - kSharedBase), w.lc->shared_bytes),
                l);
}
// issue and bulk are the starts of a cp.async and of a bulk copy into shared memory.
enum class Use : u8 { read, write, atomic, issue, bulk };
[[noreturn]] inline void race(Warp& w, u32 word, const char* what, u32 other, int l) {
  throw Fault(
      "shared-race",
      strf("shared-memory race at byte offset %u: %s by warp %u is not ordered after warp %u's (no barrier between)",
           word * 4, what, w.id, other),
      l);
}
// The async proxy may touch a word only if a fence.proxy.async lies between the last generic write of it and now.
inline void proxy_check(Warp& w, const Shadow& s, u32 word, int l) {
  const auto& vc = w.cta->vc[w.id];
  if (s.generic && w.lc->opt.proxy && s.wclock > vc[vc.size() / 2 + s.wwarp])
    throw Fault("proxy",
                strf("the async proxy (TMA or wgmma) accesses shared byte offset %u, written by warp %u with ordinary "
                     "stores and no fence.proxy.async since",
                     word * 4, s.wwarp),
                l);
}
// Checks and updates the shadow of one lane's access; off is relative to the shared base.
inline void shadow_access(Warp& w, u32 off, u32 bytes, Use use, int l, bool at = false) {
  Cta& c = *w.cta;
  const Options& opt = w.lc->opt;
  const u32 me = w.id, nw = (u32)c.warps.size();
  const u32* vc = c.vc[me].data();
  for (u32 i = off / 4, e = (off + bytes - 1) / 4; i <= e; i++) {
    Shadow& s = c.shadow[i];
    u8 bm = bytes >= 4 ? 15 : (u8)(((1u << bytes) - 1) << (off & 3));
    if (s.pend) {
      if (s.pend == 2 || use == Use::bulk)
        throw Fault("cp.async.bulk",
                    strf("%s of shared byte offset %u while a bulk copy to it is in flight (no wait on its mbarrier "
                         "has succeeded)",
                         use == Use::read ? "read" : "write", i * 4),
                    l);
      if (use == Use::issue)
        throw Fault("cp.async",
                    strf("cp.async writes shared byte offset %u while another cp.async to it is in flight", i * 4), l);
      throw Fault("cp.async",
                  strf("%s of shared byte offset %u while a cp.async to it is in flight (no "
                       "cp.async.wait_group/wait_all has covered it)",
                       use == Use::read ? "read" : "write", i * 4),
                  l);
    }
    if (use == Use::read || use == Use::atomic) {
      if (opt.uninit && (s.init & bm) != bm) {
        if (opt.uninit == 2 || use == Use::atomic)
          throw Fault("uninitialised", strf("read of uninitialised shared memory at byte offset %u", i * 4), l);
        if (!w.uninit) w.uninit_off = i * 4;
        w.uninit |= 1u << l;
      }
    }
    if (opt.races) {
      bool clash = s.wclock > vc[s.wwarp] && s.wwarp != me && (s.wbytes & bm) && !(at && s.atomic);
      if (clash && use == Use::write)
        w.overwrites.push_back({l, i, s.wwarp});
      else if (clash)
        race(w, i,
             use == Use::read     ? "a read"
             : use == Use::atomic ? "an atomic"
             : use == Use::bulk   ? "a bulk copy"
                                  : "a cp.async write",
             s.wwarp, l);
      if (use == Use::bulk) proxy_check(w, s, i, l);
      if (use == Use::read) {
        u32& r = c.reads[i * nw + me];
        if (!(s.rmask >> me & 1) || !(r & kPendingRead)) r = vc[me];
        s.rmask |= 1u << me;
        s.rbytes |= bm;
      } else {
        if (s.rbytes & bm)
          for (u32 r = s.rmask; r; r &= r - 1) {
            u32 o = first(r);
            if (c.reads[i * nw + o] & kPendingRead)
              throw Fault("async-read",
                          strf("write of shared byte offset %u while a wgmma or bulk store of warp %u still reads it "
                               "(no wait has covered it)",
                               i * 4, o),
                          l);
            if (c.reads[i * nw + o] > vc[o])
              race(w, i,
                   use == Use::issue  ? "a cp.async write (after an earlier read)"
                   : use == Use::bulk ? "a bulk copy (after an earlier read)"
                                      : "a write (after an earlier read)",
                   o, l);
          }
        s.wclock = vc[me];
        s.wwarp = (u8)me;
        s.wbytes = bm;
        s.atomic = at;
        s.rmask = 0;
        s.rbytes = 0;
      }
    }
    if (use != Use::read) s.generic = use != Use::bulk;
    if (use == Use::issue)
      s.pend = 1;
    else if (use == Use::bulk)
      s.pend = 2;
    else if (use == Use::write)
      s.init |= bm;
  }
}
// An asynchronous read of shared bytes (wgmma operands, bulk stores) must be ordered and fenced now, and guards the
// bytes against writes until async_done(tag). Returns true if some of them were never written.
inline bool async_read(Warp& w, u32 off, u32 bytes, u32 tag, int l) {
  Cta& c = *w.cta;
  const u32 me = w.id, nw = (u32)c.warps.size();
  const u32* vc = c.vc[me].data();
  bool bad = false;
  for (u32 i = off / 4, e = (off + bytes - 1) / 4; i <= e; i++) {
    Shadow& s = c.shadow[i];
    if (s.pend)
      throw Fault(
          s.pend == 2 ? "cp.async.bulk" : "cp.async",
          strf("a wgmma or bulk store reads shared byte offset %u while an asynchronous copy to it is in flight",
               i * 4),
          l);
    bad |= s.init != 15;
    if (!w.lc->opt.races) continue;
    if (s.wclock > vc[s.wwarp] && s.wwarp != me) race(w, i, "an asynchronous read", s.wwarp, l);
    proxy_check(w, s, i, l);
    s.rmask |= 1u << me;
    s.rbytes = 15;
    c.reads[i * nw + me] = kPendingRead | tag;
  }
  return bad && w.lc->opt.uninit;
}
inline void async_done(Warp& w, u32 off, u32 bytes, u32 tag) {
  Cta& c = *w.cta;
  const u32 nw = (u32)c.warps.size();
  if (w.lc->opt.races)
    for (u32 i = off / 4; i <= (off + bytes - 1) / 4; i++) {
      u32& r = c.reads[i * nw + w.id];
      if (r == (kPendingRead | tag)) r = c.vc[w.id][w.id];
    }
}
// Two warps may store the same value to one word (Triton's replicated layouts do): only a change races.
inline void check_overwrite(Warp& w, int lane, bool changed) {
  if (changed)
    for (auto& o : w.overwrites)
      if (o.lane == lane) race(w, o.word, "a write of a different value", o.other, lane);
}
// The bytes written hold an uninitialised value.
inline void shadow_forget(Warp& w, u32 off, u32 bytes) {
  for (u32 b = off; b < off + bytes; b++) {
    Shadow& s = w.cta->shadow[b / 4];
    s.init &= (u8) ~(1u << (b & 3));
  }
}
// An atomic, volatile, acquire or release access synchronises through one shared word.
inline void shared_sync(Warp& w, u32 off) {
  if (!w.lc->opt.races) return;
  auto& mine = w.cta->vc[w.id];
  auto& s = w.cta->sync_vc[off & ~3u];
  if (s.empty()) s.assign(mine.size(), 0);
  vc_join(mine, s);
  s = mine;
  mine[w.id]++;
}
inline void shared_access(Warp& w, Addrs& a, u32 m, u32 bytes, Use use, u8 flags) {
  check_align(a, m, bytes, "shared");
  for (u32 k = m; k; k &= k - 1) shared_bounds(w, a.a[first(k)], bytes, first(k));
  shared_waves(w, a, m, bytes);
  w.overwrites.clear();
  // Atomics and volatile accesses synchronise.
  bool at = use == Use::atomic || (flags & (kVolatile | kAcqRel));
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    u32 off = (u32)a.a[l] - kSharedBase;
    if (at) shared_sync(w, off);
    shadow_access(w, off, bytes, use, l, at);
  }
}
inline u8* shared_ptr(Warp& w, u64 a) { return w.cta->shared.data() + (a - kSharedBase); }
