// Lower holds what a kernel is lowered into, Dec one instruction while it is decoded.
#pragma once
#include <functional>
#include <set>

#include "lanes.h"
#include "machine.h"
#include "parse.h"

struct Module {
  RawModule raw;
  struct Var {
    std::vector<u8> mem;
    u8* p = nullptr;
    u64 size = 0;
    bool cnst = false;
    std::unique_ptr<Alloc> alloc;
  };
  // vars holds the .global and .const variables.
  std::map<std::string, Var> vars;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::string error;
};

struct Sym {
  enum K : u8 { reg, local, shared, param, var } k = reg;
  // value is an address in the symbol's own space.
  Ty ty = Ty::none;
  Opnd op;
  u64 value = 0;
};

// ops_control.h defines it.
void bra_handler(Warp&, const Inst&, u32);

class Lower;
struct Dec;
using DecodeFn = std::function<void(Dec&)>;
std::map<std::string, DecodeFn>& decode_table();
struct Reg {
  Reg(std::initializer_list<const char*> names, DecodeFn f) {
    for (auto n : names) decode_table()[n] = f;
  }
};

class Lower {
 public:
  Lower(Module& m, Kernel& k) : m_(m), k_(k) {}
  void run(const RawFunc& f);
  Opnd slot(Ty t) {
    u32 lane = t == Ty::pred ? 0 : t == Ty::b128 ? 16 : size_of(t) == 8 ? 8 : 4;
    u32 bytes = lane ? lane * kLanes : 8;
    Opnd o;
    o.off = (i32)k_.reg_bytes;
    o.width = t == Ty::pred ? 0 : (u8)size_of(t);
    k_.reg_bytes += bytes;
    k_.nregs++;
    return o;
  }
  // Width 0 makes a predicate mask.
  Opnd constant(u64 bits, int width) {
    auto key = std::make_pair(bits, width);
    auto it = consts_.find(key);
    if (it != consts_.end()) return it->second;
    Opnd o;
    o.base = 1;
    o.width = (u8)width;
    u32 lane = width == 8 ? 8 : 4;
    o.off = (i32)k_.consts.size();
    for (int l = 0; l < (width ? kLanes : 2); l++) {
      size_t n = k_.consts.size();
      k_.consts.resize(n + lane);
      std::memcpy(&k_.consts[n], &bits, lane);
    }
    return consts_[key] = o;
  }
  const Sym* find(const std::string& n);
  Opnd sreg(const std::string& name, Ty t) {
    for (auto& s : k_.sregs)
      if (s.first == name) return s.second;
    Opnd o = slot(t);
    k_.sregs.push_back({name, o});
    return o;
  }
  void jump_to(u32 inst, const std::string& label, int table = -1, int entry = 0) {
    fixes_.back().push_back({inst, table, entry, label, line_});
  }
  Kernel& kernel() { return k_; }
  Module& module() { return m_; }
  const std::vector<std::string>& targets(const std::string& n, int line) {
    for (auto it = scopes_.rbegin(); it != scopes_.rend(); ++it) {
      auto f = it->targets.find(n);
      if (f != it->targets.end()) return f->second;
    }
    throw PtxError(line, "unknown .branchtargets '" + n + "'");
  }
  void call(const RawStmt& s, Dec& d);
  u32 new_table(size_t n) {
    k_.tables.emplace_back(n, kNoPc);
    return (u32)k_.tables.size() - 1;
  }
  std::string ret_label() const { return ret_.empty() ? "" : ret_.back(); }
  u32 emit(Inst in, const std::vector<Opnd>& ops, const std::string& text) {
    in.op_first = (u32)k_.opnds.size();
    in.nop = (u16)ops.size();
    in.line = line_;
    in.file = file_;
    in.src_line = src_;
    k_.opnds.insert(k_.opnds.end(), ops.begin(), ops.end());
    k_.code.push_back(in);
    k_.op_text.push_back(text);
    return (u32)k_.code.size() - 1;
  }
  u32 alloc_local(u64 size, u32 align) {
    u32& n = k_.local_bytes;
    n = (n + align - 1) / align * align;
    u32 at = n;
    n += (u32)size;
    return at;
  }
  u32 alloc_shared(u64 size, u32 align) {
    u32& n = k_.static_shared;
    n = (n + align - 1) / align * align;
    u32 at = n;
    n += (u32)size;
    return at;
  }

 private:
  struct Scope {
    std::map<std::string, Sym> syms;
    std::map<std::string, std::pair<Ty, int>> prefixes;
    std::map<std::string, u32> labels;
    std::map<std::string, std::vector<std::string>> targets;
    bool barrier = false;
  };
  struct Fix {
    u32 inst;
    int table, entry;
    std::string label;
    int line;
  };
  Module& m_;
  Kernel& k_;
  std::vector<Scope> scopes_;
  std::vector<std::vector<Fix>> fixes_;
  std::map<std::pair<u64, int>, Opnd> consts_;
  std::map<std::string, u32> shared_at_;
  std::vector<std::string> ret_, calls_;
  int line_ = 0, file_ = 0, src_ = 0, serial_ = 0;
  void open(bool barrier = false) {
    scopes_.emplace_back();
    scopes_.back().barrier = barrier;
    fixes_.emplace_back();
  }
  void close();
  void body(const RawFunc& f);
  void declare(const VarDecl& v);
  void inst(const RawStmt& s);
};

// Dec is the state of one instruction while it is decoded.
struct Dec {
  Lower& lo;
  const RawStmt& s;
  std::string base;
  std::vector<std::string> mods;
  std::vector<bool> used;
  Inst in;
  std::vector<Opnd> ops;
  size_t next = 0;
  bool emitted = false;
  Dec(Lower& l, const RawStmt& st) : lo(l), s(st) {
    std::string cur;
    auto flush = [&] {
      if (base.empty())
        base = cur;
      else
        mods.push_back(cur);
      cur.clear();
    };
    for (char c : st.text)
      if (c == '.')
        flush();
      else
        cur += c;
    flush();
    used.assign(mods.size(), false);
  }
  [[noreturn]] void fail(const std::string& m) const { throw PtxError(s.line, m + " in '" + s.text + "'"); }
  bool take(const char* n) {
    for (size_t i = 0; i < mods.size(); i++)
      if (!used[i] && mods[i] == n) {
        used[i] = true;
        return true;
      }
    return false;
  }
  bool take_prefix(const char* n) {
    for (size_t i = 0; i < mods.size(); i++)
      if (!used[i] && mods[i].rfind(n, 0) == 0) {
        used[i] = true;
        return true;
      }
    return false;
  }
  int take_of(std::initializer_list<const char*> l) {
    int i = 0;
    for (auto n : l) {
      if (take(n)) return i;
      i++;
    }
    return -1;
  }
  Ty type() {
    Ty t = opt_type();
    if (t == Ty::none) fail("missing type");
    return t;
  }
  Ty opt_type() {
    for (size_t i = 0; i < mods.size(); i++)
      if (!used[i]) {
        Ty t = type_from_name(mods[i]);
        if (t != Ty::none) {
          used[i] = true;
          return t;
        }
      }
    return Ty::none;
  }
  void done() const {
    for (size_t i = 0; i < mods.size(); i++)
      if (!used[i]) fail("unsupported modifier '." + mods[i] + "'");
  }
  size_t nops() const { return s.ops.size(); }
  const RawOp& raw(size_t i) const {
    if (i >= s.ops.size()) fail("missing operand");
    return s.ops[i];
  }
  const RawOp& pop() { return raw(next++); }
  bool more() const { return next < s.ops.size(); }

  void dst(Ty t) { dst_op(pop(), t); }
  void dst_op(const RawOp& r, Ty t) {
    if (r.k == RawOp::vec) {
      for (auto& x : r.sub) dst_op(x, t);
      return;
    }
    if (r.k != RawOp::name) fail("bad destination operand");
    in.ndst++;
    if (r.text == "_") {
      ops.push_back(lo.slot(t));
      return;
    }
    const Sym* y = lo.find(r.text);
    if (!y || y->k != Sym::reg) fail("unknown register '" + r.text + "'");
    ops.push_back(y->op);
  }
  void src(Ty t) { src_op(pop(), t); }
  void src_op(const RawOp& r, Ty t) {
    if (r.k == RawOp::vec) {
      for (auto& x : r.sub) src_op(x, t);
      return;
    }
    ops.push_back(value(r, t));
  }
  Opnd value(const RawOp& r, Ty t) {
    int w = t == Ty::pred ? 0 : size_of(t) == 8 ? 8 : 4;
    u64 mask = size_of(t) == 8 ? ~0ull : size_of(t) == 2 ? 0xffff : size_of(t) == 1 ? 0xff : 0xffffffffu;
    switch (r.k) {
      case RawOp::integer:
        if (t == Ty::pred) return lo.constant(r.bits ? kFull : 0, 0);
        if (t == Ty::f32) return lo.constant(bitcast<u32>((float)(i64)r.bits), 4);
        if (t == Ty::f64) return lo.constant(bitcast<u64>((double)(i64)r.bits), 8);
        return lo.constant(r.bits & mask, w);
      case RawOp::f32:
        return lo.constant(t == Ty::f64 ? bitcast<u64>((double)bitcast<float>((u32)r.bits)) : (r.bits & 0xffffffffu),
                           w);
      case RawOp::f64:
        return lo.constant(w == 8 ? r.bits : bitcast<u32>((float)bitcast<double>(r.bits)), w);
      case RawOp::name:
        break;
      default:
        fail("unsupported operand kind");
    }
    if (r.text == "_") return lo.constant(0, w);
    if (r.text[0] == '%')
      if (Opnd o; special(r.text, t, o)) return o;
    if (r.text == "WARP_SZ") return lo.constant(32, w);
    const Sym* y = lo.find(r.text);
    if (!y) fail("unknown name '" + r.text + "'");
    if (y->k == Sym::reg) {
      Opnd o = y->op;
      o.neg = r.neg;
      return o;
    }
    // The value is the address of a variable.
    return lo.constant(y->value + r.bits, w);
  }
  bool special(const std::string& n, Ty t, Opnd& o) {
    static const std::set<std::string> slots = {"%tid.x",
                                                "%tid.y",
                                                "%tid.z",
                                                "%ntid.x",
                                                "%ntid.y",
                                                "%ntid.z",
                                                "%ctaid.x",
                                                "%ctaid.y",
                                                "%ctaid.z",
                                                "%nctaid.x",
                                                "%nctaid.y",
                                                "%nctaid.z",
                                                "%laneid",
                                                "%warpid",
                                                "%nwarpid",
                                                "%smid",
                                                "%nsmid",
                                                "%gridid",
                                                "%lanemask_eq",
                                                "%lanemask_le",
                                                "%lanemask_lt",
                                                "%lanemask_ge",
                                                "%lanemask_gt",
                                                "%dynamic_smem_size",
                                                "%total_smem_size",
                                                "%reserved_smem_offset_begin",
                                                "%cluster_ctaid.x",
                                                "%cluster_ctaid.y",
                                                "%cluster_ctaid.z",
                                                "%cluster_nctaid.x",
                                                "%cluster_nctaid.y",
                                                "%cluster_nctaid.z",
                                                "%clusterid.x",
                                                "%clusterid.y",
                                                "%clusterid.z",
                                                "%nclusterid.x",
                                                "%nclusterid.y",
                                                "%nclusterid.z",
                                                "%cluster_ctarank",
                                                "%cluster_nctarank",
                                                "%is_explicit_cluster"};
    if (!slots.count(n)) return false;
    o = lo.sreg(n + (size_of(t) == 8 ? ":64" : ""), size_of(t) == 8 ? Ty::u64 : Ty::u32);
    return true;
  }
  // [base + imm] pushes the base operand and returns the space to use when the instruction names none.
  void address(const RawOp& r) {
    if (r.k != RawOp::addr) fail("expected an address operand");
    if (r.text.empty()) {
      ops.push_back(lo.constant(r.bits, 8));
      in.imm = 0;
      return;
    }
    const Sym* y = lo.find(r.text);
    if (!y) fail("unknown name '" + r.text + "'");
    if (y->k == Sym::reg) {
      ops.push_back(y->op);
      in.imm = (i64)r.bits;
    } else {
      ops.push_back(lo.constant(y->value, 8));
      in.imm = (i64)r.bits;
      addr_sym = y;
    }
  }
  void address() { address(pop()); }
  const Sym* addr_sym = nullptr;
  Space space() {
    for (auto sfx : {"", "::cta"}) {
      std::string e = sfx;
      if (take(("global" + e).c_str())) return Space::global;
      if (take(("shared" + e).c_str())) return Space::shared;
    }
    if (take("local")) return Space::local;
    if (take("param") || take("param::entry") || take("param::func")) return Space::param;
    if (take("const")) return Space::cnst;
    return Space::generic;
  }
  u32 emit(Inst::Fn fn, Cls cls) {
    done();
    if (more()) fail("too many operands");
    in.fn = fn;
    in.cls = cls;
    emitted = true;
    return lo.emit(in, ops, s.text);
  }
};
