// The launches of a forward call: pack, the pass over x, the product (the last two in one launch where that is asked
// for).
#include "cuda/plan/parts.h"

namespace loradash::cuda {
namespace {

// A grid's second dimension may be no larger than this.
constexpr int64_t kMostSplits = 65535;

class ForwardPlanner : Planner {
 public:
  ForwardPlanner(const Problem& problem, const ForwardOut& out, void* workspace, const std::string& tile)
      : Planner(problem, workspace, tile, problem.weight.stored_by_columns()), out_(out) {}

  Plan run() {
    const int64_t n = problem_.shape.n;
    if (width_ > 0) down_projection();
    if (n > 0) large_product();
    if (one_)
      launch_together();
    else
      launch_apart();
    return done();
  }

 private:
  // Plans the pass over x, which makes P = dropout(x) D^T and T = P * c.
  void down_projection() {
    const auto [m, k, n] = problem_.shape;
    packed_.d_rows = workspace_.take<void>(width_ * packed_.ldd * kElementBytes);
    if (columns_)
      packed_.q_rows = workspace_.take<void>(width_ * packed_.ldq * kElementBytes);
    else
      packed_.q_columns = workspace_.take<void>(n * width_ * kElementBytes);
    down_ = pass_params(problem_.x, problem_.ldx, k);
    down_.rows_per_cta = kPassRows, down_.columns_per_cta = static_cast<int32_t>(std::max<int64_t>(1, k));
    down_.seed = problem_.dropout.seed, down_.window = problem_.dropout.window;
    down_.threshold = problem_.dropout.threshold;
    down_.keep_scale = problem_.dropout.keep_scale();
    down_.factor = packed_.d_rows, down_.ldf = packed_.ldd;
    down_.sums = out_.p, down_.scaled = workspace_.take<void>(m * width_ * kElementBytes);
  }

  // Plans [x | T] [W | Q]^T, and decides whether one launch computes it with T.
  void large_product() {
    const auto [m, k, n] = problem_.shape;
    const Weight& w = problem_.weight;
    if (w.data) gemm_.segments[0] = segment(problem_.x, problem_.ldx, w.data, columns_ ? w.stride_k : w.stride_n, k);
    gemm_.segments[1] = columns_ ? segment(down_.scaled, width_, packed_.q_rows, packed_.ldq, width_)
                                 : segment(down_.scaled, width_, packed_.q_columns, width_, width_);
    gemm_.m = static_cast<int32_t>(m), gemm_.n = static_cast<int32_t>(n);
    gemm_.out = out_.y, gemm_.bias = out_.bias, gemm_.base = out_.base;
    one_ = take_one_launch_tile(kOneLaunchX);
  }

  void launch_together() {
    take_counters(2 * gemm_.tiles_m);
    down_.rows_per_cta = one_->m;
    launch_pack();
    launch_one("", kOneLaunchX, {gemm_, down_, packed_.counters});
  }

  void launch_apart() {
    const auto [m, k, n] = problem_.shape;
    if (width_ > 0) {
      const NamedPass& pass = pick_pass(kDownPasses, width_, 0);
      const int64_t ranks = problem_.adapters.width(), blocks = ceil_div(m, kPassRows);
      const int64_t chunks = projection_chunks(problem_.card, m, k, ranks);
      if (chunks > 1) {
        down_.chunks = static_cast<int32_t>(chunks);
        down_.columns_per_cta = static_cast<int32_t>(round_up(ceil_div(k, chunks), kPassColumns));
        take_counters(blocks * rank_groups(pass.kind, width_));
        down_.arrived = packed_.counters;
        down_.projected = workspace_.take<float>(chunks * m * ranks * sizeof(float));
      }
      down_.rows_per_cta = static_cast<int32_t>(kPassRows * ceil_div(blocks, kMostSplits));
      launch_pack();
      launch_pass(pass, down_, ceil_div(m, down_.rows_per_cta), width_);
    }
    if (n > 0) launch_product();
  }

  const ForwardOut& out_;
  PassParams down_{};
};

}  // namespace

Plan plan_forward(const Problem& problem, const ForwardOut& out, void* workspace, const std::string& tile) {
  if (problem.shape.m == 0) return {};
  return ForwardPlanner(problem, out, workspace, tile).run();
}

}  // namespace loradash::cuda
