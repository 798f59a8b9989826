// What the plans of both passes are put together from: workspace, tiles and their choice, launches, and the state that
// both planners share.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <string>

#include "cuda/plan/plan.h"
#include "cuda/tiles.h"

namespace loradash::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out parts of the workspace, 256-byte aligned; from null, it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t bytes) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(bytes, 256);
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Grid {
  int64_t x, y = 1, z = 1;
};

template <typename Params>
KernelLaunch kernel_launch(std::string kernel, const Params& params, Grid grid, int64_t threads, int64_t shared) {
  const auto u32 = [](int64_t number) { return static_cast<uint32_t>(number); };
  KernelLaunch l{std::move(kernel), {u32(grid.x), u32(grid.y), u32(grid.z)}, u32(threads), u32(shared), {}};
  l.params.resize(sizeof(Params));
  std::memcpy(l.params.data(), &params, sizeof(Params));
  return l;
}

// A Tile is one entry of a list of products in tiles.h, with the threads and the bytes of shared memory that it takes.
struct Tile {
  const char* name;
  int32_t m, n, depth, threads, shared, stages;
  bool aligned;

  bool shallow() const { return stages == kShallowStages; }
};

// A NamedPass is one entry of a list of passes: the kernels' name, and what they do.
struct NamedPass {
  const char* name;
  PassKind kind;
};

#define LORADASH_NAMED_PASS(name, project, reduce, blocks) NamedPass{#name, {project, reduce, blocks}},
constexpr NamedPass kDownPasses[] = {LORADASH_DOWN_PASSES(LORADASH_NAMED_PASS)};
constexpr NamedPass kDyPasses[] = {LORADASH_DY_PASSES(LORADASH_NAMED_PASS)};
constexpr NamedPass kXPasses[] = {LORADASH_X_PASSES(LORADASH_NAMED_PASS)};
#undef LORADASH_NAMED_PASS

// Every card of sm_80 and later lets a block take this much shared memory, and every pass does with it.
constexpr int32_t kLeastShared = 99 * 1024;
constexpr bool fit(std::span<const NamedPass> family) {
  return std::ranges::all_of(family, [](const NamedPass& p) { return p.kind.shared_bytes() <= kLeastShared; });
}
static_assert(fit(kDownPasses) && fit(kDyPasses) && fit(kXPasses));

// Picks the first pass of a family that holds all ranks, or the last, which takes them in groups.
const NamedPass& pick_pass(std::span<const NamedPass> family, int64_t width, int64_t reduced);
// Returns how many programs share these ranks.
int64_t rank_groups(const PassKind& kind, int64_t ranks);

// Returns the most bytes that partial sums of one kind may take, for `ranks` ranks of an operand of so many bytes:
// enough for programs that fill the card a few times over, or a share of the operand.
int64_t most_partial_bytes(const Card& card, int64_t ranks, int64_t operand_bytes);

// A Division says how many chunks of columns a program of a pass walks, and how many rows it takes.
struct Division {
  int64_t chunks, walk, rows;

  int64_t slots() const { return ceil_div(chunks, walk); }
};

// Divides a pass over (m, n), for so many ranks projected on and reduced with: it weighs programs that the processors
// divide evenly against the partial sums that they cost, which stay within `most_partial_bytes`.
Division divide_pass(const Card& card, const PassKind& kind, int64_t m, int64_t n, int64_t projected, int64_t reduced);
// Returns the chunks of K for the projection: it weighs programs that the processors divide evenly against the partial
// sums that chunks cost.
int64_t projection_chunks(const Card& card, int64_t m, int64_t k, int64_t width);

// What planning a forward and planning a backward call have in common: a launch of the packing first, then passes and
// one large product, which may share a launch with a pass.
class Planner {
 protected:
  Planner(const Problem& problem, void* workspace, const std::string& tile, bool columns);

  // Returns the one-launch tile where that is what was asked for and what problem and card allow, and lays the product
  // out in such tiles; else null. The kind is that of the pass that shares the launch.
  const Tile* take_one_launch_tile(const PassKind& kind);

  Segment segment(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t depth) const {
    return {a, b, lda, ldb, static_cast<int32_t>(depth)};
  }
  // Takes counters from the workspace, which packing sets to zero.
  void take_counters(int64_t count);
  PassParams pass_params(const void* x, int64_t ldx, int64_t columns) const;

  void launch_pack();
  void launch_product();
  void launch_pass(const NamedPass& pass, const PassParams& params, int64_t splits, int64_t ranks);
  void launch_one(const char* prefix, const PassKind& kind, const OneLaunchParams& params);
  Plan done();

  const Problem& problem_;
  const std::string& tile_;
  Workspace workspace_;
  // This is R, padded to kRankStep.
  const int64_t width_;
  // Does the product read its right operand down the columns?
  const bool columns_;
  PackParams packed_;
  GemmParams gemm_{};
  const Tile* one_ = nullptr;
  Plan plan_{};
};

}  // namespace loradash::cuda
