#include "cuda/plan/plan.h"

#include <algorithm>
#include <utility>

#include "cuda/plan/parts.h"

namespace loradash::cuda {
namespace {

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
    const PassKind& kind = pick_pass("x", 0, q_.rank);
    const int64_t resident = std::max<int64_t>(1, q_.card.shared_limit / shared_bytes(kind));
    const int64_t rows = rows_per_program(q_.card, m, k, kPassColumns, resident, q_.rank), splits = ceil_div(m, rows);
    PassParams x = pass_params(q_, q_.x, q_.ldx, k, width_);
    x.rows_per_cta = static_cast<int32_t>(rows), x.columns_per_cta = kPassColumns;
    x.seed = q_.seed, x.threshold = q_.threshold;
    x.right = t_, x.ld_right = width_, x.right_columns = static_cast<int32_t>(q_.rank);
    x.reduced = workspace_.take<float>(splits * q_.rank * k * sizeof(float));
    plan_.launches.push_back(pass(q_, kind, x, ceil_div(k, kPassColumns), splits, q_.rank));
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
      down.rows_per_cta = static_cast<int32_t>(kPassRows * ceil_div(blocks, kMostSplits));
      plan.launches.push_back(pack(q, packed));
      plan.launches.push_back(pass(q, kind, down, chunks, ceil_div(m, down.rows_per_cta), width));
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

}  // namespace loradash::cuda
