// Tensor maps (in this emulator's own layout of the opaque 128 bytes, which ptxsim.tensor_map writes) and the bulk
// copies of sm_90 (TMA) are run here.
#pragma once
#include "ops_mbarrier.h"

struct TensorMap {
  u32 magic;
  u8 rank, type, swizzle, fill, interleave, pad[7];
  u64 base;
  u32 dim[5], pad2;
  u64 stride[4];
  u16 box[5];
  u8 estride[5], rest[33];
};
static_assert(sizeof(TensorMap) == 128, "tensor map size");
constexpr u32 kMapMagic = 0x50414d54;
// Element types are numbered as by tensormap.replace.
inline u32 map_elem(u8 t) {
  static const u8 n[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  return t < 13 ? n[t] : 0;
}
inline TensorMap tensor_map(Warp& w, u64 a, int l) {
  if (a & 63)
    throw Fault("misaligned", strf("tensor map address 0x%llx is not 64-byte aligned", (unsigned long long)a), l);
  TensorMap t;
  std::memcpy(&t, host_ptr(w, a, 128, l), 128);
  auto bad = [&](const char* m) { throw Fault("tensormap", std::string("bad tensor map: ") + m, l); };
  if (t.magic != kMapMagic) bad("the 128 bytes were not made by ptxsim.tensor_map or tensormap.replace");
  if (!map_elem(t.type) || t.rank < 1 || t.rank > 5 || t.swizzle > 3 || t.interleave)
    bad("unsupported element type, rank, swizzle or interleave");
  if (t.base & 15) bad("the tensor's address is not a multiple of 16");
  u32 es = map_elem(t.type), inner = t.box[0] * es;
  if (inner % 16) bad("the inner box is not a multiple of 16 bytes");
  if (t.swizzle && inner != 16u << t.swizzle) bad("the inner box must be as wide as the swizzle");
  for (int i = 0; i < t.rank; i++) {
    if (!t.box[i] || t.box[i] > 256) bad("box dimension not in 1..256");
    if (t.estride[i] != 1) bad("element strides other than 1 are not supported");
    if (i && (t.stride[i - 1] & 15)) bad("a stride is not a multiple of 16 bytes");
  }
  return t;
}
// Calls fn(global address, bytes in bounds, byte position in the box) for each row of the box at `at`.
template <class F>
void each_row(const TensorMap& t, const i32* at, F&& fn) {
  u32 es = map_elem(t.type), rows = 1;
  for (int i = 1; i < t.rank; i++) rows *= t.box[i];
  i64 lo = std::max<i64>(at[0], 0), hi = std::min<i64>((i64)at[0] + t.box[0], t.dim[0]);
  for (u32 r = 0; r < rows; r++) {
    u64 a = t.base;
    bool in = hi > lo;
    u32 q = r;
    for (int i = 1; i < t.rank; i++) {
      i64 x = (i64)at[i] + q % t.box[i];
      q /= t.box[i];
      in &= x >= 0 && x < t.dim[i];
      a += x * t.stride[i - 1];
    }
    if (in) fn(a + lo * es, (u32)(hi - lo) * es, r * t.box[0] * es + (u32)(lo - at[0]) * es);
  }
}
inline Ty map_type(u8 t) {
  static const Ty n[] = {Ty::u8,  Ty::u16, Ty::u32, Ty::s32,  Ty::u64, Ty::s64, Ty::f16,
                         Ty::f32, Ty::f32, Ty::f64, Ty::bf16, Ty::f32, Ty::f32};
  return n[t];
}
inline u32 box_bytes(const TensorMap& t) {
  u32 n = map_elem(t.type);
  for (int i = 0; i < t.rank; i++) n *= t.box[i];
  return n;
}
inline u64 map_field(Warp& w, const Inst& in, int i, int l) { return i < in.nop ? lane_value(w, in.op[i], l) : 0; }
// Operands are the address, [ordinal] and the value; sub is the field.
inline void tensormap_replace_h(Warp& w, const Inst& in, u32 m) {
  for (; m; m &= m - 1) {
    int l = first(m);
    u64 a = lane_addr(w, in, 0, l);
    u8* p;
    bool sh = in.space == Space::shared || (in.space == Space::generic && space_of(a) == Space::shared);
    if (sh) {
      u32 off = shared_offset(w, a, 128, 128, l);
      w.overwrites.clear();
      shadow_access(w, off, 128, Use::write, l);
      p = w.cta->shared.data() + off;
    } else {
      locate(w, a, 128, l);
      p = (u8*)a;
    }
    TensorMap t;
    std::memcpy(&t, p, 128);
    u64 v = lane_value(w, in.op[in.nop - 1], l), k = in.nop == 4 ? lane_value(w, in.op[2], l) : 0;
    if (k >= 5) throw Fault("tensormap", "tensormap.replace of a dimension beyond 4", l);
    t.magic = kMapMagic;
    switch (in.sub) {
      case 0:
        t.base = v;
        break;
      case 1:
        t.rank = (u8)(v + 1);
        break;
      case 2:
        t.box[k] = (u16)v;
        break;
      case 3:
        t.dim[k] = (u32)v;
        break;
      case 4:
        t.stride[k & 3] = v;
        break;
      case 5:
        t.estride[k] = (u8)v;
        break;
      case 6:
        t.type = (u8)v;
        break;
      case 7:
        t.interleave = (u8)v;
        break;
      case 8:
        t.swizzle = (u8)v;
        break;
      default:
        t.fill = (u8)v;
    }
    std::memcpy(p, &t, 128);
  }
}
// Operands are the global address and the shared address.
inline void tensormap_copy_h(Warp& w, const Inst& in, u32 m) {
  if (!gather(w, kFull, m)) return;
  int l = first(m);
  u64 d = lane_addr(w, in, 0, l);
  u32 off = shared_offset(w, lane_addr(w, in, 2, l), 128, 128, l);
  locate(w, d, 128, l);
  shadow_access(w, off, 128, Use::read, l);
  std::memcpy((void*)d, w.cta->shared.data() + off, 128);
  progress(w);
}

// Counts the traffic of a bulk copy: distinct sectors of its rows, and shared wavefronts of 128 bytes.
inline void bulk_stat(Warp& w, const std::vector<std::pair<u64, u32>>& rows, u32 shared_bytes, bool write, int l) {
  PcStat& st = stat_of(w);
  std::vector<std::pair<Alloc*, u64>> sect;
  st.requests++;
  for (auto& r : rows) {
    Alloc* h = locate(w, r.first, r.second, l);
    st.bytes += r.second;
    for (u64 s = h->sector(r.first); s <= h->sector(r.first + r.second - 1); s++) sect.push_back({h, s});
  }
  std::sort(sect.begin(), sect.end());
  sect.erase(std::unique(sect.begin(), sect.end()), sect.end());
  for (auto& s : sect) s.first->touch(write ? s.first->wr : s.first->rd, s.second);
  u32 n = (shared_bytes + 127) / 128;
  st.sectors += sect.size();
  st.wavefronts += n;
  st.wave_ideal += n;
}
inline void fill_nan(const TensorMap& t, std::vector<u8>& v) {
  u32 es = map_elem(t.type);
  u64 q = t.type == 6 ? 0x7e00 : t.type == 10 ? 0x7fc0 : es == 8 ? 0x7ff8000000000000ull : 0x7fc00000;
  for (size_t i = 0; i < v.size(); i += es) std::memcpy(&v[i], &q, es);
}
// A tensor copy takes the shared address, the map, [mbarrier] and coordinates; a plain one the shared address, the
// global address, [mbarrier] and the size. sub is 0 for a load, 1 for a store; vec is the rank or 0; elem names a
// reduction. CUTLASS lets whole warps issue one store; the hardware issues uniform operands once.
inline u32 distinct_lanes(Warp& w, const Inst& in, u32 m) {
  u32 keep = 0;
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    bool same = false;
    for (u32 q = keep; q && !same; q &= q - 1) {
      same = true;
      for (u32 i = 0; i < in.nop && same; i++) same = lane_value(w, in.op[i], l) == lane_value(w, in.op[i], first(q));
    }
    if (!same) keep |= 1u << l;
  }
  return keep;
}
inline void bulk_h(Warp& w, const Inst& in, u32 m) {
  if (in.sub && !in.elem && (m & (m - 1))) m = distinct_lanes(w, in, m);
  for (; m; m &= m - 1) {
    int l = first(m), o = in.sub ? 4 : 6;
    bool tensor = in.vec;
    u64 sa = lane_addr(w, in, 0, l), ga = lane_addr(w, in, 2, l);
    TensorMap t;
    i32 at[5] = {0};
    u32 bytes;
    std::vector<std::pair<u64, u32>> rows;
    std::vector<u32> pos;
    if (tensor) {
      t = tensor_map(w, ga, l);
      bytes = box_bytes(t);
      if (t.rank != in.vec)
        throw Fault("tensormap", strf("a %u-D copy with a tensor map of rank %u", in.vec, t.rank), l);
      for (int i = 0; i < in.vec; i++) at[i] = (i32)lane_value(w, in.op[o + i], l);
      each_row(t, at, [&](u64 a, u32 n, u32 p) {
        rows.push_back({a, n});
        pos.push_back(p);
      });
    } else {
      bytes = (u32)lane_value(w, in.op[o], l);
      if (bytes % 16 || (ga & 15))
        throw Fault(
            "misaligned",
            strf("cp.async.bulk of %u bytes at 0x%llx: both must be multiples of 16", bytes, (unsigned long long)ga),
            l);
      if (!bytes) continue;
      rows.push_back({ga, bytes});
      pos.push_back(0);
      t.swizzle = t.fill = 0;
    }
    u32 off = shared_offset(w, sa, bytes, tensor ? 128 : 16, l);
    bulk_stat(w, rows, bytes, in.sub, l);
    if (!in.sub) {
      MBar& b = mbar_at(w, lane_addr(w, in, 4, l), l);
      BulkLoad k{off, t.swizzle, std::vector<u8>(bytes, 0)};
      if (tensor && t.fill) fill_nan(t, k.data);
      for (size_t i = 0; i < rows.size(); i++) std::memcpy(&k.data[pos[i]], (void*)rows[i].first, rows[i].second);
      shadow_access(w, off, bytes, Use::bulk, l);
      std::memset(w.cta->shared.data() + off, 0xfd, bytes);
      b.loads.push_back(std::move(k));
    } else {
      BulkStore k{w.bulk_groups[l],
                  off,
                  bytes,
                  ++w.async_seq & 0x7fffffff,
                  (int)in.elem - 1,
                  tensor ? map_type(t.type) : in.ty,
                  false,
                  rows,
                  {}};
      if (async_read(w, off, bytes, k.tag, l))
        throw Fault("uninitialised",
                    strf("bulk store of shared memory from byte offset %u, part of which was never written", off), l);
      std::vector<u8> box(bytes);
      const u8* s = w.cta->shared.data() - kSharedBase;
      for (u32 i = 0; i < bytes; i += 16) std::memcpy(&box[i], s + swizzled((u64)off + kSharedBase + i, t.swizzle), 16);
      for (size_t i = 0; i < rows.size(); i++) k.data.insert(k.data.end(), &box[pos[i]], &box[pos[i]] + rows[i].second);
      w.stores[l].push_back(std::move(k));
    }
  }
}
inline void store_land(Warp& w, int l, u64 upto, bool read_only) {
  auto& q = w.stores[l];
  for (auto& k : q)
    if (k.group < upto && !k.read_done) {
      async_done(w, k.src, k.bytes, k.tag);
      k.read_done = true;
    }
  while (!read_only && !q.empty() && q.front().group < upto) {
    BulkStore& k = q.front();
    size_t at = 0;
    u32 es = size_of(k.ty);
    for (auto& r : k.rows) {
      if (k.reduce < 0)
        std::memcpy((void*)r.first, &k.data[at], r.second);
      else
        for (u32 i = 0; i < r.second; i += es) {
          u64 a = 0, b = 0;
          std::memcpy(&a, (void*)(r.first + i), es);
          std::memcpy(&b, &k.data[at + i], es);
          a = atom_apply((At)k.reduce, k.ty, a, b, 0);
          std::memcpy((void*)(r.first + i), &a, es);
        }
      at += r.second;
    }
    q.pop_front();
    progress(w);
  }
}
inline void bulk_commit_h(Warp& w, const Inst&, u32 m) {
  lanes(m, [&](int l) { w.bulk_groups[l]++; });
}
inline void bulk_wait_h(Warp& w, const Inst& in, u32 m) {
  for (; m; m &= m - 1) {
    int l = first(m);
    u64 g = w.bulk_groups[l];
    store_land(w, l, g > (u64)in.imm ? g - in.imm : 0, in.sub);
  }
}
inline void async_exit(Warp& w, u32 m) {
  if (!w.wgmma.empty() && m)
    throw Fault("wgmma", "exit with a wgmma in flight (no wgmma.wait_group has covered it)", first(m));
  for (u32 k = m; k; k &= k - 1) {
    int l = first(k);
    for (auto& s : w.stores[l])
      if (!s.read_done)
        throw Fault("cp.async.bulk",
                    "exit while a bulk store still reads shared memory (no cp.async.bulk.wait_group has covered it)",
                    l);
    store_land(w, l, ~0ull, false);
  }
  if (w.cta->alive == (u32)__builtin_popcount(m))
    for (auto& b : w.cta->mbars)
      if (!b.second.loads.empty())
        throw Fault("cp.async.bulk",
                    strf("the CTA exits while a bulk copy into its shared memory is in flight (mbarrier at byte offset "
                         "%u was not waited for)",
                         b.first),
                    first(m));
}
inline void decode_bulk(Dec& d) {
  if (d.take("reduce")) d.in.elem = 1;
  d.take("async");
  if (d.take("commit_group")) {
    d.emit(bulk_commit_h, Cls::tma_store);
    return;
  }
  if (d.take("wait_group")) {
    d.in.sub = d.take("read");
    d.in.imm = (i64)d.pop().bits;
    d.emit(bulk_wait_h, Cls::tma_store);
    return;
  }
  if (d.take("prefetch")) {
    d.used.assign(d.mods.size(), true);
    d.next = d.nops();
    d.emit(nop_h, Cls::other);
    return;
  }
  bool tensor = d.take("tensor"), store = d.take("bulk_group"), load = d.take("mbarrier::complete_tx::bytes");
  if (load == store) d.fail("unsupported bulk copy");
  const std::string& t = d.s.text;
  size_t g = t.find(".global"), s = t.find(".shared");
  if (g == std::string::npos || s == std::string::npos || (g < s) != store)
    d.fail("unsupported direction of a bulk copy (shared to shared needs a cluster)");
  d.take("global");
  d.take("shared::cta") || d.take("shared::cluster");
  d.take("tile");
  d.take_prefix("L2::cache_hint");
  bool cast = d.take("multicast::cluster");
  d.in.vec = tensor ? (u8)(d.take_of({"1d", "2d", "3d", "4d", "5d"}) + 1) : 0;
  if (tensor && !d.in.vec) d.fail("missing dimension");
  if (d.in.elem) {
    int op = d.take_of({"add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec"});
    d.take("noftz");
    if (op < 0 || !store) d.fail("unsupported bulk reduction");
    d.in.elem = (u8)(op + 1);
    d.in.ty = d.opt_type();
    if (d.in.ty == Ty::none && !tensor) d.fail("missing type");
  }
  d.in.sub = store;
  const RawOp &first_op = d.pop(), *map = nullptr;
  if (store) {
    map = &first_op;
    push_addr(d, d.pop());
    push_addr(d, first_op);
  } else {
    push_addr(d, first_op);
    map = &d.pop();
    push_addr(d, *map);
  }
  if (!tensor) {
    const RawOp& size = d.pop();
    if (load) push_addr(d, d.pop());
    d.src_op(size, Ty::u32);
  } else {
    if (load) push_addr(d, d.pop());
    if (map->sub.size() != 1 || map->sub[0].k != RawOp::vec || map->sub[0].sub.size() != d.in.vec)
      d.fail("bad tensor coordinates");
    for (auto& c : map->sub[0].sub) d.src_op(c, Ty::s32);
  }
  // A multicast names the only CTA of the cluster.
  if (cast) d.next++;
  // What is left is a cache policy.
  d.next = d.nops();
  d.emit(bulk_h, store ? Cls::tma_store : Cls::tma_load);
}
