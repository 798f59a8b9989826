// What plans are put together from: workspace, tiles and their choice, the parameters that calls share. Only
// plan.cpp includes this.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>

#include "cuda/plan/plan.h"
#include "cuda/tiles.h"

namespace loradash::cuda {

constexpr int64_t kPassRows = 64, kPassColumns = 128, kPassStages = 3, kPassThreads = 128;  // as in kernels/pass.cuh
constexpr int64_t kMostSplits = 65535;  // of a grid's second dimension
constexpr int64_t kChunkBytes = 16, kChunkElements = 8, kGroup = 64;
constexpr int64_t kMinRows = 256;  // of a split of M: below, partial sums outweigh what they are sums of
constexpr int32_t kGroupM = 8;

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

template <typename Params>
inline Launch launch(std::string kernel, const Params& params, std::initializer_list<int64_t> grid, int64_t threads,
                     int64_t shared) {
  Launch l{std::move(kernel), {1, 1, 1}, static_cast<uint32_t>(threads), static_cast<uint32_t>(shared), {}};
  std::transform(grid.begin(), grid.end(), l.grid, [](int64_t size) { return static_cast<uint32_t>(size); });
  l.params.resize(sizeof(Params));
  std::memcpy(l.params.data(), &params, sizeof(Params));
  return l;
}

inline std::string suffix(const Problem& q) { return q.dtype == DType::kBFloat16 ? "bf16" : "f16"; }

// Rows that 16-byte copies can read: whole chunks, from aligned addresses.
inline bool aligned(const void* data, int64_t ld, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && ld % kChunkElements == 0 &&
         columns % kChunkElements == 0;
}

// --- the product -----------------------------------------------------------------------------------------------------

struct Tile {
  const char* name;
  int32_t m, n, depth, threads, shared;
  bool aligned;
};

#define TILE(name, m, n, depth, warps_m, warps_n, stages, aligned) \
  Tile{#name, m, n, depth, 32 * warps_m * warps_n, stages * (m + n) * depth * 2, aligned},
inline const Tile kTiles[] = {LORADASH_GEMM_TILES(TILE)};
#undef TILE

#define ONE(name, m, n, depth, warps_m, warps_n, stages) \
  Tile{#name, m, n, depth, 32 * warps_m * warps_n, stages * (m + n) * depth * 2, true},
inline const Tile kOneLaunchTiles[] = {LORADASH_ONE_LAUNCH_TILES(ONE)};
#undef ONE
constexpr int64_t kOneLaunchWidth = 32;

// Share of its tensor cores that a tile can keep busy, by the operands it reads for its FLOPs: an assumption until
// measured.
inline double efficiency(const Tile& t) { return 1.0 / (1.0 + 12.0 / t.m + 12.0 / t.n); }

// The tile that is done first when each processor takes its equal number of them.
inline const Tile& pick_tile(const Card& card, int64_t m, int64_t n, bool is_aligned, const std::string& wanted) {
  const Tile* best = nullptr;
  double least = 0.0;
  for (const Tile& t : kTiles) {
    if (t.aligned != is_aligned || t.shared > card.shared_limit) continue;
    if (is_aligned && wanted == t.name) return t;
    const double rounds = static_cast<double>(ceil_div(ceil_div(m, t.m) * ceil_div(n, t.n), card.processors));
    const double cost = rounds * t.m * t.n / efficiency(t);
    if (!best || cost < least) best = &t, least = cost;
  }
  return *best;
}

// Can 16-byte copies read both operands of both segments? Rows of B run along the depth, or along n (columns).
inline bool operands_aligned(const GemmParams& params, bool columns) {
  for (const Segment& s : params.segments) {
    if (s.depth && !(aligned(s.a, s.lda, s.depth) && aligned(s.b, s.ldb, columns ? params.n : s.depth))) return false;
  }
  return true;
}

inline void lay_tiles(GemmParams& params, const Tile& tile) {
  params.tiles_m = static_cast<int32_t>(ceil_div(params.m, tile.m));
  params.tiles_n = static_cast<int32_t>(ceil_div(params.n, tile.n));
  params.group_m = kGroupM;
  params.whole = aligned(params.out, params.n, params.n) && aligned(params.base, params.n, params.n);
}

inline Launch product(const Problem& q, GemmParams params, bool columns, const std::string& wanted) {
  const Tile& tile = pick_tile(q.card, params.m, params.n, operands_aligned(params, columns), wanted);
  lay_tiles(params, tile);
  const std::string name = std::string("gemm_") + (columns ? "columns_" : "rows_") + suffix(q) + "_" + tile.name;
  return launch(name, params, {static_cast<int64_t>(params.tiles_m) * params.tiles_n}, tile.threads, tile.shared);
}

// The tile of the one-launch forward, where that is what was asked for and what the problem allows; else null.
inline const Tile* one_launch_tile(const Problem& q, const GemmParams& params, bool columns,
                                   const std::string& wanted) {
  const bool fits =
      q.weight && params.n > 0 && q.width() > 0 && q.width() <= kOneLaunchWidth && operands_aligned(params, columns);
  for (const Tile& t : kOneLaunchTiles) {
    if (fits && wanted == t.name) return &t;
  }
  return nullptr;
}

inline Segment segment(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t depth) {
  return {a, b, lda, ldb, static_cast<int32_t>(depth)};
}

// --- packing ---------------------------------------------------------------------------------------------------------

inline PackParams pack_params(const Problem& q, int64_t width) {
  PackParams params{};
  params.lora_a = q.adapters[0], params.lora_b = q.adapters[1], params.dash_u = q.adapters[2],
  params.dash_vt = q.adapters[3];
  for (int i = 0; i < 4; ++i) params.adapter_dtype[i] = static_cast<int32_t>(q.adapter_dtypes[i]);
  params.rank = static_cast<int32_t>(q.rank), params.directions = static_cast<int32_t>(q.directions);
  params.width = static_cast<int32_t>(width);
  params.k = q.shape.k, params.n = q.shape.n, params.m = q.shape.m;
  params.ldd = round_up(q.shape.k, kChunkElements), params.ldq = round_up(q.shape.n, kChunkElements);
  return params;
}

inline Launch pack(const Problem& q, const PackParams& params) {
  const int64_t most = std::max({params.width * params.ldd, params.width * params.ldq, params.m * params.p_width});
  const int64_t blocks = std::clamp<int64_t>(ceil_div(most, 4 * 256), 1, 4 * q.card.processors);
  return launch("pack_" + suffix(q), params, {blocks}, 256, 0);
}

// --- passes ----------------------------------------------------------------------------------------------------------

struct PassKind {
  const char* name;
  int32_t project, reduce, blocks;
};

#define PASS(name, project, reduce, blocks) PassKind{#name, project, reduce, blocks},
inline const PassKind kPasses[] = {LORADASH_DOWN_TILES(PASS) LORADASH_BACKWARD_TILES(PASS)};
#undef PASS

constexpr PassKind kOneLaunchDy{"", 4, 3, 2};  // of dx in one launch

inline int64_t shared_bytes(const PassKind& kind) {  // as PassTile::kSharedBytes
  const int64_t x = kPassRows * kPassColumns * 2, f = 8 * kind.project * kPassColumns * 2;
  const int64_t right = kind.reduce ? kPassRows * (kind.reduce | 1) * kChunkBytes : 0;
  const int64_t tiles = kPassStages * (x + (kind.reduce ? 0 : f) + right) + (kind.reduce ? kind.blocks * f : 0);
  return tiles + (kind.project ? kPassThreads * 4 + 16 : 0);
}

// The first kernel of a family ("down", "dy", "x") that holds all ranks, or the last, over groups of ranks.
inline const PassKind& pick_pass(const std::string& family, int64_t width, int64_t reduced) {
  const PassKind* last = nullptr;
  for (const PassKind& kind : kPasses) {
    if (std::string(kind.name).rfind(family + "_", 0) != 0) continue;
    last = &kind;
    if ((kind.project == 0 || 8 * kind.project >= width) && (kind.reduce == 0 || 8 * kind.reduce >= reduced)) break;
  }
  return *last;
}

inline PassParams pass_params(const Problem& q, const void* x, int64_t ldx, int64_t columns, int64_t width) {
  PassParams params{};
  params.x = x, params.ldx = ldx;
  params.m = static_cast<int32_t>(q.shape.m), params.n = static_cast<int32_t>(columns);
  params.keep_scale = 1.0f;
  params.rank = static_cast<int32_t>(q.rank), params.directions = static_cast<int32_t>(q.directions);
  params.width = static_cast<int32_t>(width);
  params.scaling = q.scaling, params.dash_sigma = q.dash_sigma;
  return params;
}

inline Launch pass(const Problem& q, const PassKind& kind, const PassParams& params, int64_t chunks, int64_t splits,
                   int64_t ranks) {
  const std::string name =
      std::string(kind.name) + "_" + suffix(q) + (aligned(params.x, params.ldx, params.n) ? "" : "_any");
  const int64_t groups = std::max<int64_t>(1, ceil_div(ranks, std::max(kind.project, kind.reduce) * 8));
  return launch(name, params, {chunks, splits, groups}, kPassThreads, shared_bytes(kind));
}

// Rows of a program of a pass over (m, n), of which a processor holds `resident`: splits of M that the processors
// divide evenly, against the partial sums that splits cost.
inline int64_t rows_per_program(const Card& card, int64_t m, int64_t n, int64_t columns, int64_t resident,
                                int64_t reduced) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(n, columns));
  const int64_t most = std::max<int64_t>(1, ceil_div(2 * resident * card.processors, chunks));
  int64_t best = round_up(m, kPassRows);
  double least = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t rows = round_up(ceil_div(m, splits), kPassRows);
    if (splits > 1 && rows < kMinRows) break;
    const int64_t rounds = ceil_div(chunks * ceil_div(m, rows), card.processors);
    const double cost = 2.0 * static_cast<double>(rounds * card.processors * rows * columns) +
                        8.0 * static_cast<double>(ceil_div(m, rows) * reduced * n);
    if (splits == 1 || cost < least) best = rows, least = cost;
  }
  return best;
}

// Chunks of K for the projection: programs that the processors divide evenly, against the partial sums that chunks
// cost.
inline int64_t projection_chunks(const Card& card, int64_t m, int64_t k, int64_t width) {
  int64_t best = 1;
  double least = 0.0;
  for (int64_t chunks = 1; chunks <= std::min<int64_t>(8, std::max<int64_t>(1, k / (2 * kPassColumns))); ++chunks) {
    const int64_t columns = round_up(std::max<int64_t>(1, ceil_div(k, chunks)), kPassColumns);
    if (std::max<int64_t>(1, ceil_div(k, columns)) != chunks) continue;
    const int64_t rounds = ceil_div(ceil_div(m, kPassRows) * chunks, card.processors);
    const double read = 2.0 * static_cast<double>(rounds * card.processors * kPassRows * columns);
    const double cost = read + (chunks > 1 ? 8.0 * static_cast<double>(m * width * chunks) : 0.0);
    if (chunks == 1 || cost < least) best = chunks, least = cost;
  }
  return best;
}

inline float keep_scale(const Problem& q) { return q.seed ? 65536.0f / static_cast<float>(65536 - q.threshold) : 1.0f; }

}  // namespace loradash::cuda
