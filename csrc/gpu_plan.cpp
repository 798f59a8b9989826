#include "gpu_plan.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "gpu_tiles.h"

namespace loradash::gpu {
namespace {

constexpr int64_t kPassRows = 64, kPassColumns = 128, kPassStages = 3, kPassThreads = 128;  // as in common/pass.cuh
constexpr int64_t kChunkBytes = 16, kChunkElements = 8, kGroup = 64;
constexpr int64_t kMinRows = 256;  // of a split of M: below, partial sums outweigh what they are sums of
constexpr int32_t kGroupM = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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
Launch launch(std::string kernel, const Params& params, std::initializer_list<int64_t> grid, int64_t threads,
              int64_t shared) {
  Launch l{std::move(kernel), {1, 1, 1}, static_cast<uint32_t>(threads), static_cast<uint32_t>(shared), {}};
  std::transform(grid.begin(), grid.end(), l.grid, [](int64_t size) { return static_cast<uint32_t>(size); });
  l.params.resize(sizeof(Params));
  std::memcpy(l.params.data(), &params, sizeof(Params));
  return l;
}

std::string suffix(const Problem& q) { return q.dtype == DType::kBFloat16 ? "bf16" : "f16"; }

// Rows that 16-byte copies can read: whole chunks, from aligned addresses.
bool aligned(const void* data, int64_t ld, int64_t columns) {
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
const Tile kTiles[] = {LORADASH_GEMM_TILES(TILE)};
#undef TILE

#define ONE(name, m, n, depth, warps_m, warps_n, stages) \
  Tile{#name, m, n, depth, 32 * warps_m * warps_n, stages * (m + n) * depth * 2, true},
const Tile kOneLaunchTiles[] = {LORADASH_ONE_LAUNCH_TILES(ONE)};
#undef ONE
constexpr int64_t kOneLaunchWidth = 32;

// Share of its tensor cores that a tile can keep busy, by the operands it reads for its FLOPs: an assumption until
// measured.
double efficiency(const Tile& t) { return 1.0 / (1.0 + 12.0 / t.m + 12.0 / t.n); }

// The tile that is done first when each processor takes its equal number of them.
const Tile& pick_tile(const Card& card, int64_t m, int64_t n, bool is_aligned, const std::string& wanted) {
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
bool operands_aligned(const GemmParams& params, bool columns) {
  for (const Segment& s : params.segments) {
    if (s.depth && !(aligned(s.a, s.lda, s.depth) && aligned(s.b, s.ldb, columns ? params.n : s.depth))) return false;
  }
  return true;
}

void lay_tiles(GemmParams& params, const Tile& tile) {
  params.tiles_m = static_cast<int32_t>(ceil_div(params.m, tile.m));
  params.tiles_n = static_cast<int32_t>(ceil_div(params.n, tile.n));
  params.group_m = kGroupM;
  params.whole = aligned(params.out, params.n, params.n) && aligned(params.base, params.n, params.n);
}

Launch product(const Problem& q, GemmParams params, bool columns, const std::string& wanted) {
  const Tile& tile = pick_tile(q.card, params.m, params.n, operands_aligned(params, columns), wanted);
  lay_tiles(params, tile);
  const std::string name = std::string("gemm_") + (columns ? "columns_" : "rows_") + suffix(q) + "_" + tile.name;
  return launch(name, params, {static_cast<int64_t>(params.tiles_m) * params.tiles_n}, tile.threads, tile.shared);
}

// The tile of the one-launch forward, where that is what was asked for and what the problem allows; else null.
const Tile* one_launch_tile(const Problem& q, const GemmParams& params, bool columns, const std::string& wanted) {
  const bool fits =
      q.weight && params.n > 0 && q.width() > 0 && q.width() <= kOneLaunchWidth && operands_aligned(params, columns);
  for (const Tile& t : kOneLaunchTiles) {
    if (fits && wanted == t.name) return &t;
  }
  return nullptr;
}

Segment segment(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t depth) {
  return {a, b, lda, ldb, static_cast<int32_t>(depth)};
}

// --- packing ---------------------------------------------------------------------------------------------------------

PackParams pack_params(const Problem& q, int64_t width) {
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

Launch pack(const Problem& q, const PackParams& params) {
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
const PassKind kPasses[] = {LORADASH_DOWN_TILES(PASS) LORADASH_BACKWARD_TILES(PASS)};
#undef PASS

constexpr PassKind kOneLaunchDy{"", 4, 3, 2};  // of dx in one launch

int64_t shared_bytes(const PassKind& kind) {  // as PassTile::kSharedBytes
  const int64_t x = kPassRows * kPassColumns * 2, f = 8 * kind.project * kPassColumns * 2;
  const int64_t right = kind.reduce ? kPassRows * (kind.reduce | 1) * kChunkBytes : 0;
  const int64_t tiles = kPassStages * (x + (kind.reduce ? 0 : f) + right) + (kind.reduce ? kind.blocks * f : 0);
  return tiles + (kind.project ? kPassThreads * 4 + 16 : 0);
}

// The first kernel of a family ("down", "dy", "x") that holds all ranks, or the last, over groups of ranks.
const PassKind& pick_pass(const std::string& family, int64_t width, int64_t reduced) {
  const PassKind* last = nullptr;
  for (const PassKind& kind : kPasses) {
    if (std::string(kind.name).rfind(family + "_", 0) != 0) continue;
    last = &kind;
    if ((kind.project == 0 || 8 * kind.project >= width) && (kind.reduce == 0 || 8 * kind.reduce >= reduced)) break;
  }
  return *last;
}

PassParams pass_params(const Problem& q, const void* x, int64_t ldx, int64_t columns, int64_t width) {
  PassParams params{};
  params.x = x, params.ldx = ldx;
  params.m = static_cast<int32_t>(q.shape.m), params.n = static_cast<int32_t>(columns);
  params.keep_scale = 1.0f;
  params.rank = static_cast<int32_t>(q.rank), params.directions = static_cast<int32_t>(q.directions);
  params.width = static_cast<int32_t>(width);
  params.scaling = q.scaling, params.dash_sigma = q.dash_sigma;
  return params;
}

Launch pass(const Problem& q, const PassKind& kind, const PassParams& params, int64_t chunks, int64_t splits,
            int64_t ranks) {
  const std::string name =
      std::string(kind.name) + "_" + suffix(q) + (aligned(params.x, params.ldx, params.n) ? "" : "_any");
  const int64_t groups = std::max<int64_t>(1, ceil_div(ranks, std::max(kind.project, kind.reduce) * 8));
  return launch(name, params, {chunks, splits, groups}, kPassThreads, shared_bytes(kind));
}

// Rows of a program of a pass over (m, n), of which a processor holds `resident`: splits of M that the processors
// divide evenly, against the partial sums that splits cost.
int64_t rows_per_program(const Card& card, int64_t m, int64_t n, int64_t columns, int64_t resident, int64_t reduced) {
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
int64_t projection_chunks(const Card& card, int64_t m, int64_t k, int64_t width) {
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

float keep_scale(const Problem& q) { return q.seed ? 65536.0f / static_cast<float>(65536 - q.threshold) : 1.0f; }

// The launches of a backward call: pack, the pass over dy and dx (two launches or one), the pass over x, the second
// stage of sums.
class BackwardPlanner {
 public:
  BackwardPlanner(const Problem& q, const BackwardOut& out, void* memory, const std::string& tile)
      : q_(q),
        out_(out),
        tile_(tile),
        workspace_(memory),
        width_(round_up(q.width(), kRankStep)),
        packed_(pack_params(q, width_)) {
    // dx reads W (N, K) down its columns, unless it is stored the other way round.
    columns_ = !(q.weight && q.weight_n == 1 && q.weight_k != 1);
    needs_dx_ = out.dx && q.shape.k > 0;
    needs_da_ = out.da && q.rank > 0 && q.shape.k > 0;
    needs_sigma_ = out.dsigma && q.directions > 0;
    needs_db_ = out.db_lora && q.rank > 0;
    needs_g_ = width_ > 0 && (needs_dx_ || needs_da_ || needs_sigma_);
    right_columns_ = q.rank + (out.dbias ? 1 : 0);
  }

  Plan run() {
    if (needs_dx_) large_product();
    if (needs_g_ || needs_db_ || out_.dbias) over_dy();
    if (needs_dx_ && !one_) plan_.launches.push_back(product(q_, gemm_, columns_, tile_));
    if (needs_da_) over_x();
    finish();
    plan_.workspace_bytes = workspace_.used();
    return std::move(plan_);
  }

 private:
  // dy W, and whether the launch that computes it can also make its low-rank term.
  void large_product() {
    const auto [m, k, n] = q_.shape;
    gemm_.m = static_cast<int32_t>(m), gemm_.n = static_cast<int32_t>(k);
    gemm_.out = out_.dx, gemm_.seed = q_.seed, gemm_.threshold = q_.threshold, gemm_.keep_scale = keep_scale(q_);
    if (q_.weight) gemm_.segments[1] = segment(out_.dy, out_.lddy, q_.weight, columns_ ? q_.weight_n : q_.weight_k, n);
    one_ = one_launch_tile(q_, gemm_, columns_, tile_);
    if (one_ && 8 * kOneLaunchDy.reduce < right_columns_) one_ = nullptr;
    if (one_) lay_tiles(gemm_, *one_);
  }

  void over_dy() {
    const auto [m, k, n] = q_.shape;
    const PassKind& kind = one_ ? kOneLaunchDy : pick_pass("dy", width_, right_columns_);
    const int64_t per_chunk = kind.blocks * kPassColumns, chunks = ceil_div(n, per_chunk);
    const int64_t rows = one_ ? one_->m : rows_per_program(q_.card, m, n, per_chunk, 1, right_columns_);
    const int64_t splits = ceil_div(m, rows), row_blocks = ceil_div(m, kPassRows);
    const int64_t arrivals = row_blocks * std::max<int64_t>(1, ceil_div(std::max(width_, right_columns_), kGroup));
    PassParams dy = pass_params(q_, out_.dy, out_.lddy, n, width_);
    dy.rows_per_cta = static_cast<int32_t>(rows), dy.columns_per_cta = static_cast<int32_t>(per_chunk);
    reduce_dy(dy, splits);
    packed_.counter_count = static_cast<int32_t>(arrivals + (one_ ? 2 * gemm_.tiles_m : 0));
    packed_.counters = dy.arrived = workspace_.take<int32_t>(packed_.counter_count * sizeof(int32_t));
    project_dy(dy, chunks, row_blocks);
    if (needs_dx_ && width_ > 0) low_rank_of_dx();
    plan_.launches.push_back(pack(q_, packed_));
    if (!one_) {
      plan_.launches.push_back(pass(q_, kind, dy, chunks, splits, std::max(width_, right_columns_)));
      return;
    }
    std::swap(gemm_.segments[0], gemm_.segments[1]);  // the low-rank term comes last: this launch has to make it first
    const OneLaunchParams params{gemm_, dy, static_cast<int32_t>(chunks), packed_.counters + arrivals};
    const int64_t programs =
        std::min<int64_t>(static_cast<int64_t>(gemm_.tiles_m) * gemm_.tiles_n, 2 * q_.card.processors);
    plan_.launches.push_back(launch("dx_" + tile_ + (columns_ ? "_columns_" : "_rows_") + suffix(q_), params,
                                    {programs}, one_->threads, std::max<int64_t>(one_->shared, shared_bytes(kind))));
  }

  // dB and db: dy^T [P_r | 1].
  void reduce_dy(PassParams& dy, int64_t splits) {
    const auto [m, k, n] = q_.shape;
    packed_.p = out_.p;
    packed_.p_width = static_cast<int32_t>(round_up(std::max<int64_t>(1, right_columns_), kChunkElements));
    packed_.p_low = workspace_.take<void>(m * packed_.p_width * kBytes);
    dy.right = packed_.p_low, dy.ld_right = packed_.p_width, dy.right_columns = static_cast<int32_t>(right_columns_);
    if (needs_db_ || out_.dbias) dy.reduced = workspace_.take<float>(splits * right_columns_ * n * sizeof(float));
    sums_.dy_parts = dy.reduced, sums_.splits_y = static_cast<int32_t>(splits);
    sums_.dy_columns = static_cast<int32_t>(right_columns_);
  }

  // G = dy Q, as T = G * c, and the parts of d(sigma). Always computed: a pass without it would be one more kernel for
  // a case that nobody trains.
  void project_dy(PassParams& dy, int64_t chunks, int64_t row_blocks) {
    const int64_t m = q_.shape.m;
    packed_.q_rows = workspace_.take<void>(width_ * packed_.ldq * kBytes);
    dy.factor = packed_.q_rows, dy.ldf = packed_.ldq;
    dy.projected = workspace_.take<float>(chunks * m * q_.width() * sizeof(float));
    dy.scaled = t_ = workspace_.take<void>(m * width_ * kBytes);
    if (!needs_sigma_) return;
    dy.p = out_.p;
    dy.dsigma_parts = workspace_.take<float>(row_blocks * q_.directions * sizeof(float));
    sums_.dsigma_parts = dy.dsigma_parts, sums_.sigma_blocks = static_cast<int32_t>(row_blocks);
  }

  void low_rank_of_dx() {
    const int64_t k = q_.shape.k;
    if (columns_) {
      packed_.d_rows = workspace_.take<void>(width_ * packed_.ldd * kBytes);
      gemm_.segments[0] = segment(t_, width_, packed_.d_rows, packed_.ldd, width_);
    } else {
      packed_.d_columns = workspace_.take<void>(k * width_ * kBytes);
      gemm_.segments[0] = segment(t_, width_, packed_.d_columns, width_, width_);
    }
  }

  // dA: T_r^T x, masked.
  void over_x() {
    const auto [m, k, n] = q_.shape;
    const int64_t rows = rows_per_program(q_.card, m, k, kPassColumns, 3, q_.rank), splits = ceil_div(m, rows);
    PassParams x = pass_params(q_, q_.x, q_.ldx, k, width_);
    x.rows_per_cta = static_cast<int32_t>(rows), x.columns_per_cta = kPassColumns;
    x.seed = q_.seed, x.threshold = q_.threshold;
    x.right = t_, x.ld_right = width_, x.right_columns = static_cast<int32_t>(q_.rank);
    x.reduced = workspace_.take<float>(splits * q_.rank * k * sizeof(float));
    plan_.launches.push_back(pass(q_, pick_pass("x", 0, q_.rank), x, ceil_div(k, kPassColumns), splits, q_.rank));
    sums_.da_parts = x.reduced, sums_.splits_x = static_cast<int32_t>(splits);
  }

  void finish() {
    const auto [m, k, n] = q_.shape;
    if (needs_da_) sums_.da = out_.da;
    if (needs_db_) sums_.db_lora = out_.db_lora;
    if (needs_sigma_) sums_.dsigma = out_.dsigma;
    sums_.dbias = out_.dbias;
    if (!sums_.da && !sums_.db_lora && !sums_.dsigma && !sums_.dbias) return;
    sums_.k = k, sums_.n = n;
    sums_.rank = static_cast<int32_t>(q_.rank), sums_.directions = static_cast<int32_t>(q_.directions);
    sums_.scale_a = keep_scale(q_), sums_.scale_b = q_.scaling;
    const int64_t most = std::max(q_.rank * k, (q_.rank + 1) * n);
    const int64_t programs = std::clamp<int64_t>(ceil_div(most, 256), 1, 8 * q_.card.processors);
    plan_.launches.push_back(launch("finish_sums", sums_, {programs}, 256, 0));
  }

  static constexpr int64_t kBytes = 2;  // of an element of x
  const Problem& q_;
  const BackwardOut& out_;
  const std::string& tile_;
  Workspace workspace_;
  int64_t width_, right_columns_;
  PackParams packed_;
  bool columns_, needs_dx_, needs_da_, needs_sigma_, needs_db_, needs_g_;
  const Tile* one_ = nullptr;
  GemmParams gemm_{};
  FinishParams sums_{};
  void* t_ = nullptr;
  Plan plan_{};
};

}  // namespace

std::vector<std::string> gemm_tiles(const Card& card) {
  std::vector<std::string> names;
  for (const Tile& t : kTiles) {
    if (t.aligned && t.shared <= card.shared_limit) names.emplace_back(t.name);
  }
  for (const Tile& t : kOneLaunchTiles) names.emplace_back(t.name);
  return names;
}

Plan plan_forward(const Problem& q, const ForwardOut& out, void* memory, const std::string& tile) {
  const auto [m, k, n] = q.shape;
  Workspace workspace(memory);
  Plan plan{};
  if (m == 0) return plan;
  const int64_t width = round_up(q.width(), kRankStep), bytes = 2;
  const bool columns = q.weight && q.weight_n == 1 && q.weight_k != 1;  // W is stored (K, N)
  PackParams packed = pack_params(q, width);
  PassParams down{};
  void* t = nullptr;
  if (width > 0) {
    packed.d_rows = workspace.take<void>(width * packed.ldd * bytes);
    if (columns)
      packed.q_rows = workspace.take<void>(width * packed.ldq * bytes);
    else
      packed.q_columns = workspace.take<void>(n * width * bytes);
    t = workspace.take<void>(m * width * bytes);
    down = pass_params(q, q.x, q.ldx, k, width);
    down.rows_per_cta = kPassRows, down.columns_per_cta = static_cast<int32_t>(std::max<int64_t>(1, k));
    down.seed = q.seed, down.threshold = q.threshold, down.keep_scale = keep_scale(q);
    down.factor = packed.d_rows, down.ldf = packed.ldd;
    down.sums = out.p, down.scaled = t;
  }
  GemmParams gemm{};
  if (n > 0) {
    if (q.weight) gemm.segments[0] = segment(q.x, q.ldx, q.weight, columns ? q.weight_k : q.weight_n, k);
    gemm.segments[1] = columns ? segment(t, width, packed.q_rows, packed.ldq, width)
                               : segment(t, width, packed.q_columns, width, width);
    gemm.m = static_cast<int32_t>(m), gemm.n = static_cast<int32_t>(n);
    gemm.out = out.y, gemm.bias = out.bias, gemm.base = out.base;
  }
  if (const Tile* one = one_launch_tile(q, gemm, columns, tile)) {
    lay_tiles(gemm, *one);
    packed.counter_count = 2 * gemm.tiles_m;
    packed.counters = workspace.take<int32_t>(packed.counter_count * sizeof(int32_t));
    down.rows_per_cta = one->m;
    const int64_t programs =
        std::min<int64_t>(static_cast<int64_t>(gemm.tiles_m) * gemm.tiles_n, 2 * q.card.processors);
    const int64_t shared = std::max<int64_t>(one->shared, shared_bytes(pick_pass("down", width, 0)));
    plan.launches.push_back(pack(q, packed));
    plan.launches.push_back(launch(tile + (columns ? "_columns_" : "_rows_") + suffix(q),
                                   OneLaunchParams{gemm, down, 1, packed.counters}, {programs}, one->threads, shared));
  } else {
    if (width > 0) {
      const PassKind& kind = pick_pass("down", width, 0);
      const int64_t blocks = ceil_div(m, kPassRows), chunks = projection_chunks(q.card, m, k, q.width());
      if (chunks > 1) {
        down.columns_per_cta = static_cast<int32_t>(round_up(ceil_div(k, chunks), kPassColumns));
        packed.counter_count = static_cast<int32_t>(blocks * ceil_div(width, 8 * kind.project));
        packed.counters = down.arrived = workspace.take<int32_t>(packed.counter_count * sizeof(int32_t));
        down.projected = workspace.take<float>(chunks * m * q.width() * sizeof(float));
      }
      plan.launches.push_back(pack(q, packed));
      plan.launches.push_back(pass(q, kind, down, chunks, blocks, width));
    }
    if (n > 0) plan.launches.push_back(product(q, gemm, columns, tile));
  }
  plan.workspace_bytes = workspace.used();
  return plan;
}

Plan plan_backward(const Problem& q, const BackwardOut& out, void* memory, const std::string& tile) {
  if (q.shape.m == 0 || q.shape.n == 0) return {};
  return BackwardPlanner(q, out, memory, tile).run();
}

}  // namespace loradash::gpu
