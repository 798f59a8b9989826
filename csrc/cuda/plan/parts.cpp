#include "cuda/plan/parts.h"

#include <stdexcept>

namespace loradash::cuda {
namespace {

// Below so many rows of a split of M, partial sums outweigh what they are sums of.
constexpr int64_t kMinRows = 256;
// Partial sums of one kind, for every kRankStep ranks: so many bytes for each processor, or this share of the operand.
// The first lets programs fill a card at every shape: were both bounds tight at once, so that slots times splits are
// fewest, there would be 5 programs a processor at R = 24, 2 at R = 64.
constexpr int64_t kPartialBytes = 512 * 1024, kPartialShare = 32;
// Rows of tiles that neighbouring programs share in L2.
constexpr int32_t kGroupM = 8;

#define LORADASH_TILE(name, m, n, depth, warps_m, warps_n, stages, aligned) \
  Tile{#name, m, n, depth, gemm_threads(warps_m, warps_n), gemm_shared_bytes(m, n, depth, stages), stages, aligned},
#define LORADASH_ONE_LAUNCH_TILE(...) LORADASH_TILE(__VA_ARGS__, true)
constexpr Tile kTiles[] = {LORADASH_GEMM_TILES(LORADASH_TILE)};
constexpr Tile kOneLaunchTiles[] = {LORADASH_ONE_LAUNCH_TILES(LORADASH_ONE_LAUNCH_TILE)};

// Product and pass take turns in the same shared memory.
int32_t one_launch_bytes(const Tile& t, const PassKind& kind) { return std::max(t.shared, kind.shared_bytes()); }

std::string suffix(const Problem& problem) { return problem.dtype == DType::kBFloat16 ? "bf16" : "f16"; }
const char* order(bool columns) { return columns ? "columns_" : "rows_"; }

// Can 16-byte copies read these rows? They take whole chunks, from aligned addresses.
bool aligned(const void* data, int64_t ld, int64_t columns) {
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && ld % kChunk == 0 && columns % kChunk == 0;
}

// Can 16-byte copies read both operands of both segments? Rows of B run along the depth, or along n (columns).
bool operands_aligned(const GemmParams& params, bool columns) {
  for (const Segment& s : params.segments) {
    if (s.depth && !(aligned(s.a, s.lda, s.depth) && aligned(s.b, s.ldb, columns ? params.n : s.depth))) return false;
  }
  return true;
}

// Returns the share of its tensor cores that a tile can keep busy, by the operands it reads for its FLOPs: an
// assumption until measured.
double efficiency(const Tile& t) { return 1.0 / (1.0 + 12.0 / t.m + 12.0 / t.n); }

// Picks the tile that is done first when each processor takes its equal number of them; the shallow one where all of
// the depth fits its stages, and only there.
const Tile& pick_tile(const Card& card, const GemmParams& gemm, bool is_aligned, const std::string& wanted) {
  const Tile* best = nullptr;
  double least = 0.0;
  const int64_t depth = gemm.segments[0].depth + gemm.segments[1].depth;
  for (const Tile& t : kTiles) {
    if (t.aligned != is_aligned || t.shared > card.shared_limit) continue;
    if (is_aligned && wanted == t.name) return t;
    if (is_aligned && t.shallow() != (depth <= kShallowStages * t.depth)) continue;
    const int64_t tiles = ceil_div(gemm.m, t.m) * ceil_div(gemm.n, t.n);
    const double cost = static_cast<double>(ceil_div(tiles, card.processors)) * t.m * t.n / efficiency(t);
    if (!best || cost < least) best = &t, least = cost;
  }
  return *best;
}

void lay_tiles(GemmParams& params, const Tile& tile) {
  params.tiles_m = static_cast<int32_t>(ceil_div(params.m, tile.m));
  params.tiles_n = static_cast<int32_t>(ceil_div(params.n, tile.n));
  params.group_m = kGroupM;
  params.whole = aligned(params.out, params.n, params.n) && aligned(params.base, params.n, params.n);
}

PackParams pack_params(const Problem& problem, int64_t width) {
  const auto& a = problem.adapters;
  PackParams params{};
  const auto put = [&](Adapter adapter, const TypedMatrix& matrix, const void*& data) {
    data = matrix.data, params.adapter_dtype[adapter] = static_cast<int32_t>(matrix.dtype);
  };
  put(kLoraA, a.lora_a, params.lora_a), put(kLoraB, a.lora_b, params.lora_b);
  put(kDashU, a.dash_u, params.dash_u), put(kDashVt, a.dash_vt, params.dash_vt);
  params.rank = static_cast<int32_t>(a.rank), params.directions = static_cast<int32_t>(a.directions);
  params.width = static_cast<int32_t>(width);
  params.k = problem.shape.k, params.n = problem.shape.n, params.m = problem.shape.m;
  params.ldd = round_up(params.k, kChunk), params.ldq = round_up(params.n, kChunk);
  return params;
}

}  // namespace

const NamedPass& pick_pass(std::span<const NamedPass> family, int64_t width, int64_t reduced) {
  for (const NamedPass& pass : family) {
    const PassKind& kind = pass.kind;
    if ((kind.project == 0 || kind.projected() >= width) && (kind.reduce == 0 || kind.reduced() >= reduced))
      return pass;
  }
  return family.back();
}

int64_t rank_groups(const PassKind& kind, int64_t ranks) { return std::max<int64_t>(1, ceil_div(ranks, kind.ranks())); }

int64_t most_partial_bytes(const Card& card, int64_t ranks, int64_t operand_bytes) {
  return std::max<int64_t>(1, ceil_div(ranks, kRankStep)) *
         std::max(card.processors * kPartialBytes, operand_bytes / kPartialShare);
}

Division divide_pass(const Card& card, const PassKind& kind, int64_t m, int64_t n, int64_t projected, int64_t reduced) {
  const int64_t columns = kind.blocks * kPassColumns, chunks = std::max<int64_t>(1, ceil_div(n, columns));
  const int64_t resident = std::clamp(card.shared_limit / kind.shared_bytes(), 1, kind.resident());
  const int64_t limit = most_partial_bytes(card, std::max(projected, reduced), m * n * kElementBytes);
  const auto most_of = [&](int64_t values) {
    return std::max<int64_t>(1, limit / std::max<int64_t>(1, values * static_cast<int64_t>(sizeof(float))));
  };
  const int64_t least_walk = ceil_div(chunks, std::min(chunks, most_of(m * projected)));
  // Where programs must walk, a few steps more may divide better.
  const int64_t most_walk = least_walk == 1 ? 1 : least_walk + 3;
  Division best{chunks, least_walk, round_up(m, kPassRows)};
  double least = -1.0;
  for (int64_t walk = least_walk; walk <= most_walk; ++walk) {
    const int64_t slots = ceil_div(chunks, walk);
    const int64_t most = std::min(most_of(reduced * n), ceil_div(2 * resident * card.processors, slots));
    for (int64_t splits = 1; splits <= most; ++splits) {
      const int64_t rows = round_up(ceil_div(m, splits), kPassRows);
      if (splits > 1 && rows < kMinRows) break;
      const int64_t rounds = ceil_div(slots * ceil_div(m, rows), card.processors);
      const double cost = 2.0 * static_cast<double>(rounds * card.processors * rows * walk * columns) +
                          8.0 * static_cast<double>(ceil_div(m, rows) * reduced * n + slots * m * projected);
      if (least < 0 || cost < least) best = {chunks, walk, rows}, least = cost;
    }
  }
  return best;
}

int64_t projection_chunks(const Card& card, int64_t m, int64_t k, int64_t width) {
  int64_t best = 1;
  double least = 0.0;
  const int64_t parts = most_partial_bytes(card, width, m * k * kElementBytes) /
                        std::max<int64_t>(1, m * width * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::clamp<int64_t>(std::min(parts, k / (2 * kPassColumns)), 1, 8);
  for (int64_t chunks = 1; chunks <= most; ++chunks) {
    const int64_t columns = round_up(std::max<int64_t>(1, ceil_div(k, chunks)), kPassColumns);
    if (std::max<int64_t>(1, ceil_div(k, columns)) != chunks) continue;
    const int64_t rounds = ceil_div(ceil_div(m, kPassRows) * chunks, card.processors);
    const double read = 2.0 * static_cast<double>(rounds * card.processors * kPassRows * columns);
    const double cost = read + (chunks > 1 ? 8.0 * static_cast<double>(m * width * chunks) : 0.0);
    if (chunks == 1 || cost < least) best = chunks, least = cost;
  }
  return best;
}

Planner::Planner(const Problem& problem, void* workspace, const std::string& tile, bool columns)
    : problem_(problem),
      tile_(tile),
      workspace_(workspace),
      width_(round_up(problem.adapters.width(), kRankStep)),
      columns_(columns),
      packed_(pack_params(problem, width_)) {
  if (problem.card.shared_limit < kLeastShared) {
    throw std::invalid_argument("loradash CUDA kernels take up to " + std::to_string(kLeastShared) +
                                " bytes of shared memory a block, the card gives " +
                                std::to_string(problem.card.shared_limit));
  }
}

const Tile* Planner::take_one_launch_tile(const PassKind& kind) {
  const int64_t width = problem_.adapters.width();
  if (!problem_.weight.data || gemm_.n == 0 || width == 0 || width > kOneLaunchX.projected()) return nullptr;
  if (!operands_aligned(gemm_, columns_)) return nullptr;
  const auto tile = std::ranges::find_if(kOneLaunchTiles, [&](const Tile& t) { return tile_ == t.name; });
  if (tile == std::end(kOneLaunchTiles) || one_launch_bytes(*tile, kind) > problem_.card.shared_limit) return nullptr;
  lay_tiles(gemm_, *tile);
  return tile;
}

void Planner::take_counters(int64_t count) {
  packed_.counter_count = static_cast<int32_t>(count);
  packed_.counters = workspace_.take<int32_t>(count * sizeof(int32_t));
}

PassParams Planner::pass_params(const void* x, int64_t ldx, int64_t columns) const {
  const auto& a = problem_.adapters;
  PassParams params{};
  params.x = x, params.ldx = ldx;
  params.m = static_cast<int32_t>(problem_.shape.m), params.n = static_cast<int32_t>(columns);
  params.keep_scale = 1.0f, params.chunks = params.walk = 1;
  params.rank = static_cast<int32_t>(a.rank), params.directions = static_cast<int32_t>(a.directions);
  params.width = static_cast<int32_t>(width_);
  params.scaling = a.scaling, params.dash_sigma = a.dash_sigma;
  return params;
}

void Planner::launch_pack() {
  const PackParams& p = packed_;
  const int64_t most = std::max({p.width * p.ldd, p.width * p.ldq, p.m * p.p_width});
  const int64_t blocks = std::clamp<int64_t>(ceil_div(most, 4 * kSmallThreads), 1, 4 * problem_.card.processors);
  plan_.launches.push_back(kernel_launch("pack_" + suffix(problem_), p, {blocks}, kSmallThreads, 0));
}

void Planner::launch_product() {
  const Tile& tile = pick_tile(problem_.card, gemm_, operands_aligned(gemm_, columns_), tile_);
  lay_tiles(gemm_, tile);
  const std::string name = std::string("gemm_") + order(columns_) + suffix(problem_) + "_" + tile.name;
  const int64_t tiles = static_cast<int64_t>(gemm_.tiles_m) * gemm_.tiles_n;
  plan_.launches.push_back(kernel_launch(name, gemm_, {tiles}, tile.threads, tile.shared));
}

void Planner::launch_pass(const NamedPass& pass, const PassParams& params, int64_t splits, int64_t ranks) {
  const char* any = aligned(params.x, params.ldx, params.n) ? "" : "_any";
  const int64_t slots = ceil_div(params.chunks, params.walk);
  plan_.launches.push_back(kernel_launch(std::string(pass.name) + "_" + suffix(problem_) + any, params,
                                         {slots, splits, rank_groups(pass.kind, ranks)}, kPassThreads,
                                         pass.kind.shared_bytes()));
}

void Planner::launch_one(const char* prefix, const PassKind& kind, const OneLaunchParams& params) {
  const int64_t tiles = static_cast<int64_t>(gemm_.tiles_m) * gemm_.tiles_n;
  const int64_t programs = std::min<int64_t>(tiles, kOneLaunchResident * problem_.card.processors);
  plan_.launches.push_back(kernel_launch(std::string(prefix) + one_->name + "_" + order(columns_) + suffix(problem_),
                                         params, {programs}, one_->threads, one_launch_bytes(*one_, kind)));
}

Plan Planner::done() {
  plan_.workspace_bytes = workspace_.used();
  return std::move(plan_);
}

std::vector<std::string> gemm_tiles(const Card& card) {
  std::vector<std::string> names;
  for (const Tile& t : kTiles) {
    if (t.aligned && t.shared <= card.shared_limit) names.emplace_back(t.name);
  }
  for (const Tile& t : kOneLaunchTiles) {
    const int32_t most = std::max(one_launch_bytes(t, kOneLaunchX), one_launch_bytes(t, kOneLaunchDy));
    if (most <= card.shared_limit) names.emplace_back(t.name);
  }
  return names;
}

}  // namespace loradash::cuda
