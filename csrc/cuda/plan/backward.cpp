// The launches of a backward call: pack, the pass over dy and dx (two launches or one), the pass over x, the second
// stage of sums.
#include <utility>

#include "cuda/plan/parts.h"

namespace loradash::cuda {
namespace {

// In one launch with dx a program keeps its sums of dy^T [P_r | 1] for the rows of a tile alone. Such partial sums may
// take this many times what others may; beyond, there are two launches.
constexpr int64_t kOneLaunchParts = 8;

class BackwardPlanner : Planner {
 public:
  BackwardPlanner(const Problem& problem, const BackwardOut& out, void* workspace, const std::string& tile)
      : Planner(problem, workspace, tile, !problem.weight.stored_by_columns()),
        out_(out),
        rank_(problem.adapters.rank),
        directions_(problem.adapters.directions),
        right_columns_(rank_ + (out.dbias ? 1 : 0)),
        needs_dx_(out.dx && problem.shape.k > 0),
        needs_da_(out.da && rank_ > 0 && problem.shape.k > 0),
        needs_sigma_(out.dsigma && directions_ > 0),
        needs_db_(out.db_lora && rank_ > 0) {}

  Plan run() {
    const bool needs_g = width_ > 0 && (needs_dx_ || needs_da_ || needs_sigma_);
    if (needs_dx_) large_product();
    if (needs_g || needs_db_ || out_.dbias) over_dy();
    if (needs_dx_ && !one_) launch_product();
    if (needs_da_) over_x();
    finish();
    return done();
  }

 private:
  // Plans dy W, and decides whether the launch that computes it also makes its low-rank term.
  void large_product() {
    const auto [m, k, n] = problem_.shape;
    const Weight& w = problem_.weight;
    gemm_.m = static_cast<int32_t>(m), gemm_.n = static_cast<int32_t>(k);
    gemm_.out = out_.dx, gemm_.seed = problem_.dropout.seed, gemm_.window = problem_.dropout.window;
    gemm_.threshold = problem_.dropout.threshold;
    gemm_.keep_scale = problem_.dropout.keep_scale();
    if (w.data) gemm_.segments[1] = segment(out_.dy, out_.lddy, w.data, columns_ ? w.stride_n : w.stride_k, n);
    if (right_columns_ > kOneLaunchDy.reduced()) return;
    one_ = take_one_launch_tile(kOneLaunchDy);
    if (!one_) return;
    const int64_t parts = ceil_div(m, one_->m) * right_columns_ * n * static_cast<int64_t>(sizeof(float));
    const int64_t limit = most_partial_bytes(problem_.card, right_columns_, m * n * kElementBytes);
    if (parts > kOneLaunchParts * limit) one_ = nullptr;
  }

  void over_dy() {
    const auto [m, k, n] = problem_.shape;
    const NamedPass& pass = pick_pass(kDyPasses, width_, right_columns_);
    const PassKind& kind = one_ ? kOneLaunchDy : pass.kind;
    const int64_t per_chunk = kind.blocks * kPassColumns;
    const Division division = one_ ? Division{ceil_div(n, per_chunk), ceil_div(n, per_chunk), one_->m}
                                   : divide_pass(problem_.card, kind, m, n, rank_ + directions_, right_columns_);
    const int64_t splits = ceil_div(m, division.rows), row_blocks = ceil_div(m, kPassRows);
    const int64_t ranks = std::max(width_, right_columns_), arrivals = row_blocks * rank_groups(kind, ranks);
    PassParams dy = pass_params(out_.dy, out_.lddy, n);
    dy.rows_per_cta = static_cast<int32_t>(division.rows), dy.columns_per_cta = static_cast<int32_t>(per_chunk);
    dy.chunks = static_cast<int32_t>(division.chunks), dy.walk = static_cast<int32_t>(division.walk);
    reduce_dy(dy, splits);
    take_counters(arrivals + (one_ ? 2 * gemm_.tiles_m : 0));
    dy.arrived = packed_.counters;
    project_dy(dy, division.slots(), row_blocks);
    if (needs_dx_ && width_ > 0) low_rank_of_dx();
    launch_pack();
    if (one_) {
      // The low-rank term comes last: this launch has to make it first.
      std::swap(gemm_.segments[0], gemm_.segments[1]);
      launch_one("dx_", kind, {gemm_, dy, packed_.counters + arrivals});
    } else {
      launch_pass(pass, dy, splits, ranks);
    }
  }

  // Plans the reduction dy^T [P_r | 1], which is dB and db.
  void reduce_dy(PassParams& dy, int64_t splits) {
    const auto [m, k, n] = problem_.shape;
    packed_.p = out_.p;
    packed_.p_width = static_cast<int32_t>(round_up(std::max<int64_t>(1, right_columns_), kChunk));
    packed_.p_low = workspace_.take<void>(m * packed_.p_width * kElementBytes);
    dy.right = packed_.p_low, dy.ld_right = packed_.p_width, dy.right_columns = static_cast<int32_t>(right_columns_);
    if (needs_db_ || out_.dbias) dy.reduced = workspace_.take<float>(splits * right_columns_ * n * sizeof(float));
    sums_.dy_parts = dy.reduced, sums_.splits_y = static_cast<int32_t>(splits);
    sums_.dy_columns = static_cast<int32_t>(right_columns_);
  }

  // Plans the projection G = dy Q, as T = G * c, and the parts of d(sigma). It is always computed: a pass without it
  // would be one more kernel, for a case that nobody trains.
  void project_dy(PassParams& dy, int64_t slots, int64_t row_blocks) {
    const int64_t m = problem_.shape.m;
    packed_.q_rows = workspace_.take<void>(width_ * packed_.ldq * kElementBytes);
    dy.factor = packed_.q_rows, dy.ldf = packed_.ldq;
    dy.projected = workspace_.take<float>(slots * m * (rank_ + directions_) * sizeof(float));
    dy.scaled = t_ = workspace_.take<void>(m * width_ * kElementBytes);
    if (!needs_sigma_) return;
    dy.p = out_.p;
    dy.dsigma_parts = workspace_.take<float>(row_blocks * directions_ * sizeof(float));
    sums_.dsigma_parts = dy.dsigma_parts, sums_.sigma_blocks = static_cast<int32_t>(row_blocks);
  }

  void low_rank_of_dx() {
    const int64_t k = problem_.shape.k;
    if (columns_) {
      packed_.d_rows = workspace_.take<void>(width_ * packed_.ldd * kElementBytes);
      gemm_.segments[0] = segment(t_, width_, packed_.d_rows, packed_.ldd, width_);
    } else {
      packed_.d_columns = workspace_.take<void>(k * width_ * kElementBytes);
      gemm_.segments[0] = segment(t_, width_, packed_.d_columns, width_, width_);
    }
  }

  // Plans the pass over x, which reduces it to dA = T_r^T dropout(x).
  void over_x() {
    const auto [m, k, n] = problem_.shape;
    const NamedPass& pass = pick_pass(kXPasses, 0, rank_);
    const Division division = divide_pass(problem_.card, pass.kind, m, k, 0, rank_);
    const int64_t splits = ceil_div(m, division.rows);
    PassParams x = pass_params(problem_.x, problem_.ldx, k);
    x.rows_per_cta = static_cast<int32_t>(division.rows), x.columns_per_cta = kPassColumns;
    x.chunks = static_cast<int32_t>(division.chunks);
    x.seed = problem_.dropout.seed, x.window = problem_.dropout.window;
    x.threshold = problem_.dropout.threshold;
    x.right = t_, x.ld_right = width_, x.right_columns = static_cast<int32_t>(rank_);
    x.reduced = workspace_.take<float>(splits * rank_ * k * sizeof(float));
    launch_pass(pass, x, splits, rank_);
    sums_.da_parts = x.reduced, sums_.splits_x = static_cast<int32_t>(splits);
  }

  void finish() {
    const auto [m, k, n] = problem_.shape;
    if (needs_da_) sums_.da = out_.da;
    if (needs_db_) sums_.db_lora = out_.db_lora;
    if (needs_sigma_) sums_.dsigma = out_.dsigma;
    sums_.dbias = out_.dbias;
    if (!sums_.da && !sums_.db_lora && !sums_.dsigma && !sums_.dbias) return;
    sums_.k = k, sums_.n = n;
    sums_.rank = static_cast<int32_t>(rank_), sums_.directions = static_cast<int32_t>(directions_);
    sums_.scale_a = problem_.dropout.keep_scale(), sums_.scale_b = problem_.adapters.scaling;
    const int64_t most = std::max(rank_ * k, (rank_ + 1) * n);
    const int64_t programs = std::clamp<int64_t>(ceil_div(most, kSmallThreads), 1, 8 * problem_.card.processors);
    plan_.launches.push_back(kernel_launch("finish_sums", sums_, {programs}, kSmallThreads, 0));
  }

  const BackwardOut& out_;
  const int64_t rank_, directions_, right_columns_;
  const bool needs_dx_, needs_da_, needs_sigma_, needs_db_;
  FinishParams sums_{};
  void* t_ = nullptr;
};

}  // namespace

Plan plan_backward(const Problem& problem, const BackwardOut& out, void* workspace, const std::string& tile) {
  if (problem.shape.m == 0 || problem.shape.n == 0) return {};
  return BackwardPlanner(problem, out, workspace, tile).run();
}

}  // namespace loradash::cuda
