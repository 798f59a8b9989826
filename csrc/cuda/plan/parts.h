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
  int32_t m, n, depth, threads, shared;
  bool aligned;
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

// Picks the first pass of a family that holds all ranks, or the last, which takes them in groups.
const NamedPass& pick_pass(std::span<const NamedPass> family, int64_t width, int64_t reduced);
// Returns how many programs share these ranks.
int64_t rank_groups(const PassKind& kind, int64_t ranks);

// Returns the rows that a program of a pass over (m, n) takes: it weighs splits of M that the processors divide evenly
// against the partial sums that splits cost.
int64_t rows_per_program(const Card& card, const PassKind& kind, int64_t m, int64_t n, int64_t reduced);
// Returns the chunks of K for the projection: it weighs programs that the processors divide evenly against the partial
// sums that chunks cost.
int64_t projection_chunks(const Card& card, int64_t m, int64_t k, int64_t width);

// What planning a forward and planning a backward call have in common: a launch of the packing first, then passes and
// one large product, which may share a launch with a pass.
class Planner {
 protected:
  Planner(const Problem& problem, void* workspace, const std::string& tile, bool columns);

  // Returns the one-launch tile where that is what was asked for and what the problem allows, and lays the product out
  // in such tiles; else null.
  const Tile* take_one_launch_tile();

  Segment segment(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t depth) const {
    return {a, b, lda, ldb, static_cast<int32_t>(depth)};
  }
  // Takes counters from the workspace, which packing sets to zero.
  void take_counters(int64_t count);
  PassParams pass_params(const void* x, int64_t ldx, int64_t columns) const;

  void launch_pack();
  void launch_product();
  void launch_pass(const NamedPass& pass, const PassParams& params, int64_t chunks, int64_t splits, int64_t ranks);
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
