// Backward, with G = dy Q and c = [scaling ; dash_sigma], for one layer or for several that read the same x:
//   dx = sum of dy W + mask * ((G * c) D) / (1 - p)    dA = scaling G_r^T dropout(x)    dB = scaling dy^T P_r
//   d(dash_sigma)_i = sum_m G_s P_s                    db = sum_m dy
//
// FLOPs: 2 M N K + 2 M (R N + r N + r K + R K) of every member. Bytes: every dy once, x once and dx once for all
// members, W once per block of rows. Per block of rows: one pass over a dy gives its G, dB and db while it enters L2,
// and dy W while it is there: L2 holds the dy of one member, not of all, so their sum waits in fp32. The mask is drawn
// once, for all dA, which are one product, and for dx; the masked low-rank terms of all members are one product that
// joins a tile of dx, while it is in cache, with the last dy W. Sums over M are taken block after block into at most 16
// partial sums, which are then added in order.
#include <utility>
#include <vector>

#include "blocking.h"

namespace loradash::cpu {
namespace {

template <typename T, typename E>
class Backward {
 public:
  Backward(const BackwardParams& params)
      : p_(params),
        kernels_(*kernels<T, E>()),
        width_(total_width(params.members, params.count)),
        first_packed_(params.count),
        blocks_(cut_rows<E>(params.m, deepest(params))),
        k_panels_(ceil_div(params.k, kPanel)),
        words_(ceil_div(params.k, 32)),
        d_(pack_d(kernels_, params.members, params.count, params.k, false)),
        members_(params.count) {
    pack_q(kernels_, p_.members, p_.count, true, [&](int64_t i, Panels<E> q) { members_[i].q = q; });
    int64_t partials = 0;
    for (int64_t i = 0, first = 0; i < p_.count; ++i) {
      const BackwardMember& given = p_.members[i];
      Member& member = members_[i];
      member.first = first, first += given.adapters.width();
      member.panels = ceil_div(given.n, kPanel), member.groups = ceil_div(member.panels, kPanelGroup);
      member.first_rank = ranks_, ranks_ += given.da ? given.adapters.rank : 0;
      member.w = {static_cast<const E*>(given.packed), given.packed ? padded_depth<E>(given.n) : 0};
      groups_ += member.groups;
      if (given.packed) first_packed_ = std::min(first_packed_, i);
      partials += member.panels * ((given.db_lora ? given.adapters.rank : 0) + (given.dbias ? 1 : 0)) * kPanel +
                  (given.dsigma ? given.adapters.directions : 0);
    }
    partials += k_panels_ * ranks_ * kPanel;
    grad_p_ = scratch<float>(kGradP, p_.m * width_);
    float* partial = scratch<float>(kPartials, blocks_.splits * partials);
    std::fill_n(partial, blocks_.splits * partials, 0.0f);
    const auto take = [&](int64_t per_split) { return std::exchange(partial, partial + blocks_.splits * per_split); };
    partial_a_ = take(k_panels_ * ranks_ * kPanel);
    for (int64_t i = 0; i < p_.count; ++i) {
      const BackwardMember& given = p_.members[i];
      Member& member = members_[i];
      if (given.db_lora) member.partial_b = take(member.panels * given.adapters.rank * kPanel);
      if (given.dbias) member.partial_bias = take(member.panels * kPanel);
      if (given.dsigma) member.partial_sigma = take(given.adapters.directions);
    }
  }

  void run(const ThreadPool& pool) const {
    if (blocks_.splits >= pool.threads)
      run_by_split(pool);
    else
      run_by_panel(pool);
    reduce(pool);
  }

 private:
  struct Member {
    // Its first column of P and G, and its first among the ranks whose dA is wanted.
    int64_t first, first_rank;
    int64_t panels, groups;
    Panels<E> q, w;
    float *partial_b = nullptr, *partial_bias = nullptr, *partial_sigma = nullptr;
  };

  static int64_t deepest(const BackwardParams& params) {
    int64_t depth = params.k;
    for (int64_t i = 0; i < params.count; ++i) depth = std::max(depth, params.members[i].n);
    return depth;
  }

  // Enough blocks for every thread: each takes whole blocks, whose dy and x stay in its L2.
  void run_by_split(const ThreadPool& pool) const {
    parallel(pool, kernels_, blocks_.splits, [&](int64_t split) {
      for_blocks(split, [&](int64_t m0, int64_t rows) {
        RowOperand<E> last;
        for (int64_t i = 0; i < p_.count; ++i) {
          last = stage_dy(i, m0, rows);
          gradient_of_p(i, m0, rows, last);
          gradient_of_sigma(i, split, m0, rows);
          gradient_of_b(i, split, m0, rows, 0, members_[i].panels);
          if (i + 1 < p_.count) add_base(i, rows, last, 0, k_panels_);
        }
        const uint32_t* bits = draw_mask(m0, rows, 0, k_panels_);
        gradient_of_a(split, m0, rows, 0, k_panels_, bits, words_);
        gradient_of_x(m0, rows, last, 0, k_panels_, bits, words_);
      });
    });
  }

  // Few rows: threads share the columns of a block. The mask is drawn once per group of panels and use.
  void run_by_panel(const ThreadPool& pool) const {
    const int64_t tiles = ceil_div(p_.m, kernels_.tile_rows), k_groups = ceil_div(k_panels_, kPanelGroup);
    parallel(pool, kernels_, tiles, [&](int64_t tile) {
      const int64_t m0 = tile * kernels_.tile_rows, rows = std::min<int64_t>(kernels_.tile_rows, p_.m - m0);
      for (int64_t i = 0; i < p_.count; ++i) gradient_of_p(i, m0, rows, stage_dy(i, m0, rows));
    });
    parallel(pool, kernels_, blocks_.splits * groups_, [&](int64_t task) {
      const int64_t split = task / groups_;
      int64_t i = 0, group = task % groups_;
      while (group >= members_[i].groups) group -= members_[i++].groups;
      const int64_t first = group * kPanelGroup, last = std::min(members_[i].panels, first + kPanelGroup);
      for_blocks(split, [&](int64_t m0, int64_t rows) {
        if (first == 0) gradient_of_sigma(i, split, m0, rows);
        gradient_of_b(i, split, m0, rows, first, last);
      });
    });
    parallel(pool, kernels_, blocks_.splits * k_groups, [&](int64_t task) {
      const int64_t split = task / k_groups, first = task % k_groups * kPanelGroup;
      const int64_t last = std::min(k_panels_, first + kPanelGroup);
      for_blocks(split, [&](int64_t m0, int64_t rows) {
        const uint32_t* bits = draw_mask(m0, rows, first, last);
        gradient_of_a(split, m0, rows, first, last, bits, last - first);
        if (!p_.dx) return;
        const int64_t end = p_.count - 1;
        for (int64_t i = 0; i < end; ++i) add_base(i, rows, stage_dy(i, m0, rows), first, last);
        gradient_of_x(m0, rows, stage_dy(end, m0, rows), first, last, bits, last - first);
      });
    });
  }

  template <typename F>
  void for_blocks(int64_t split, const F& body) const {
    for (int64_t block = blocks_.split_begin(split); block < blocks_.split_begin(split + 1); ++block)
      body(blocks_.begin(block), blocks_.size(block));
  }

  bool needs_mask() const { return p_.dropout.active() && width_ && (ranks_ || p_.dx); }

  // Returns words of keep bits, one for each row and panel of 32 columns.
  const uint32_t* draw_mask(int64_t m0, int64_t rows, int64_t first, int64_t last) const {
    if (!needs_mask()) return nullptr;
    uint32_t* bits = scratch<uint32_t>(kBits, rows * (last - first));
    kernels_.dropout_bits(p_.dropout, m0, rows, first * kPanel, std::min(p_.k, last * kPanel), bits, last - first);
    return bits;
  }

  // A dy is the left operand of dy Q and dy W; the next one that is staged takes its place.
  RowOperand<E> stage_dy(int64_t i, int64_t m0, int64_t rows) const {
    const int64_t n = p_.members[i].n;
    E* staged = scratch<E>(kStaged, rows * tile_pitch<E>(n));
    return row_operand(kernels_, dy(i, m0), p_.members[i].lddy, rows, n, nullptr, 0, staged);
  }

  // G (rows, R) = dy Q, the columns of one member.
  void gradient_of_p(int64_t i, int64_t m0, int64_t rows, RowOperand<E> dy) const {
    const int64_t width = p_.members[i].adapters.width();
    if (width)
      multiply_narrow(kernels_, dy, rows, members_[i].q, width, 1.0f, grad_p_ + m0 * width_ + members_[i].first,
                      width_);
  }

  void gradient_of_sigma(int64_t index, int64_t split, int64_t m0, int64_t rows) const {
    const BackwardMember& given = p_.members[index];
    if (!given.dsigma) return;
    const int64_t directions = given.adapters.directions, first = members_[index].first + given.adapters.rank;
    for (int64_t i = 0; i < directions; ++i) {
      double sum = 0;
      for (int64_t m = m0; m < m0 + rows; ++m)
        sum += static_cast<double>(grad_p_[m * width_ + first + i]) * p_.p[m * width_ + first + i];
      members_[index].partial_sigma[split * directions + i] += static_cast<float>(sum);
    }
  }

  // partial (panel, r, 32) += P_r^T dy, and column sums of dy
  void gradient_of_b(int64_t i, int64_t split, int64_t m0, int64_t rows, int64_t first, int64_t last) const {
    const BackwardMember& given = p_.members[i];
    const Member& member = members_[i];
    const int64_t n = given.n, rank = given.adapters.rank;
    if (given.dbias)
      for (int64_t panel = first; panel < last; ++panel)
        kernels_.column_sums(dy(i, m0) + panel * kPanel, given.lddy, rows, columns(n, panel),
                             member.partial_bias + (split * member.panels + panel) * kPanel);
    if (given.db_lora)
      gradient_of_factor(p_.p + m0 * width_ + member.first, width_, rank, rows, dy(i, m0), given.lddy, n, first, last,
                         nullptr, 0, member.partial_b + split * member.panels * rank * kPanel);
  }

  // partial (panel, r, 32) += G_r^T (mask * x), r of all members whose dA is wanted.
  void gradient_of_a(int64_t split, int64_t m0, int64_t rows, int64_t first, int64_t last, const uint32_t* bits,
                     int64_t bits_stride) const {
    if (!ranks_) return;
    const float* narrow = grad_p_ + m0 * width_;
    int64_t ld = width_;
    if (p_.count > 1) narrow = columns_of_ranks(narrow, rows), ld = ranks_;
    gradient_of_factor(narrow, ld, ranks_, rows, x(m0), p_.ldx, p_.k, first, last, bits, bits_stride,
                       partial_a_ + split * k_panels_ * ranks_ * kPanel);
  }

  // Returns the columns of G (rows, R) whose dA is wanted, side by side.
  const float* columns_of_ranks(const float* g, int64_t rows) const {
    float* found = scratch<float>(kRanks, rows * ranks_);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t i = 0; i < p_.count; ++i)
        if (p_.members[i].da)
          std::copy_n(g + m * width_ + members_[i].first, p_.members[i].adapters.rank,
                      found + m * ranks_ + members_[i].first_rank);
    return found;
  }

  // partial (panel, rank, 32) += narrow (rows, ld)[:, :rank]^T wide (rows, 32), for panels first to last; `bits`
  // begin at panel `first`. It takes a few rows at a time: a panel is 128 bytes of each, and more rows than the TLB has
  // pages would miss on every one.
  void gradient_of_factor(const float* narrow, int64_t narrow_ld, int64_t rank, int64_t rows, const T* wide, int64_t ld,
                          int64_t size, int64_t first, int64_t last, const uint32_t* bits, int64_t bits_stride,
                          float* partial) const {
    constexpr int64_t kRows = 64;
    const int64_t pitch = tile_pitch<E>(kRows);
    E* transposed = scratch<E>(kSmall, rank * pitch);
    const RowOperand<E> a{transposed, pitch};
    E* staged = scratch<E>(kStagedPanel, kRows * kPanel);
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t count = std::min(kRows, rows - m), depth = padded_depth<E>(count);
      for_tiles(kernels_, rank, [&](int64_t i, int height) {
        kernels_.transpose_tile(narrow + m * narrow_ld + i, narrow_ld, count, height, pitch, transposed + i * pitch);
      });
      for (int64_t panel = first; panel < last; ++panel) {
        const T* src = wide + m * ld + panel * kPanel;
        const uint32_t* words = bits ? bits + m * bits_stride + panel - first : nullptr;
        Term<E> term{nullptr, a.ld, staged, kPanel, depth, nullptr, 0};
        if constexpr (std::is_same_v<T, E> && std::is_same_v<E, float>)
          // Rows of memory will do as they are.
          if (!words && columns(size, panel) == kPanel) term.b = src, term.ldb = ld;
        if (term.b == staged) kernels_.stage_panel(src, ld, count, columns(size, panel), words, bits_stride, staged);
        float* sums = partial + panel * rank * kPanel;
        for_tiles(kernels_, rank, [&](int64_t i, int height) {
          term.a = a.at(i, height, 0);
          kernels_.multiply(&term, 1, height, sums + i * kPanel, true);
        });
      }
    }
  }

  // The sums of dy W (panel, rows, 32) of a block of rows; one member needs no more than a panel.
  float* sums_of_base(int64_t rows, int64_t panels) const {
    return scratch<float>(kTiles, (p_.count > 1 ? panels : 1) * rows * kPanel);
  }

  // Adds dy W of a member that others follow.
  void add_base(int64_t index, int64_t rows, RowOperand<E> dy, int64_t first, int64_t last) const {
    if (!p_.dx || !members_[index].w.data) return;
    float* c = sums_of_base(rows, last - first);
    const Sum<E> sum{{dy, members_[index].w}, index > first_packed_, false};
    const auto nothing = [](auto...) {};
    for (int64_t panel = first; panel < last; ++panel)
      multiply_block(kernels_, sum, panel, rows, nullptr, 0, c + (panel - first) * rows * kPanel, nothing, nothing);
  }

  // dx (rows, panels) = the sums that are there + dy W of the last member + the masked low-rank terms of all
  void gradient_of_x(int64_t m0, int64_t rows, RowOperand<E> dy, int64_t first, int64_t last, const uint32_t* bits,
                     int64_t bits_stride) const {
    if (!p_.dx) return;
    const int64_t k = p_.k;
    const bool begun = first_packed_ + 1 < p_.count;
    float* factors = scratch<float>(kFactors, width_);
    for (int64_t i = 0; i < p_.count; ++i)
      column_factors(p_.members[i].adapters, p_.dropout.keep_scale(), factors + members_[i].first);
    const RowOperand<E> scaled = scaled_operand(kernels_, grad_p_ + m0 * width_, width_, rows, width_, factors);
    const Sum<E> sum{{dy, members_.back().w}, begun, true, scaled, d_};
    float* c = sums_of_base(rows, last - first);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t x0 = m0 * k + panel * kPanel;
      const auto store = [&](int64_t i, int height, const float* tile) {
        kernels_.store_tile(tile, height, columns(k, panel), nullptr,
                            p_.base ? static_cast<const T*>(p_.base) + x0 + i * k : nullptr,
                            static_cast<T*>(p_.dx) + x0 + i * k, k);
      };
      const auto fetch = [&](int64_t i, int height) {
        fetch_tile(static_cast<T*>(p_.dx) + x0 + i * k, k, height, columns(k, panel));
      };
      multiply_block(kernels_, sum, panel, rows, bits ? bits + panel - first : nullptr, bits_stride,
                     begun ? c + (panel - first) * rows * kPanel : c, fetch, store);
    }
  }

  // The second stage of the sums over M adds the splits in order and writes the gradients in their layouts.
  void reduce(const ThreadPool& pool) const {
    for (int64_t i = 0; i < p_.count; ++i) {
      const BackwardMember& given = p_.members[i];
      const Member& member = members_[i];
      const int64_t rank = given.adapters.rank, directions = given.adapters.directions;
      const float scaling = given.adapters.scaling;
      if (given.db_lora)
        reduce_factor(pool, member.partial_b, member.panels, given.n, rank, 0, rank, scaling, given.db_lora, 1, rank);
      if (given.da)
        reduce_factor(pool, partial_a_, k_panels_, p_.k, ranks_, member.first_rank, rank,
                      scaling * p_.dropout.keep_scale(), given.da, p_.k, 1);
      if (given.dbias) {
        std::fill_n(given.dbias, given.n, 0.0f);
        add_splits(member.partial_bias, member.panels * kPanel, given.n, given.dbias);
      }
      if (given.dsigma) {
        std::fill_n(given.dsigma, directions, 0.0f);
        add_splits(member.partial_sigma, directions, directions, given.dsigma);
      }
    }
  }

  // Adds to out (count) the partial sums of every split, which lie `stride` apart.
  void add_splits(const float* partial, int64_t stride, int64_t count, float* out) const {
    for (int64_t split = 0; split < blocks_.splits; ++split)
      for (int64_t j = 0; j < count; ++j) out[j] += partial[split * stride + j];
  }

  // out[i * stride_rank + column * stride_column] = factor * sum over splits of partial (panel, ranks, 32), of `rank`
  // ranks from `first` on.
  void reduce_factor(const ThreadPool& pool, const float* partial, int64_t panels, int64_t size, int64_t ranks,
                     int64_t first, int64_t rank, float factor, float* out, int64_t stride_rank,
                     int64_t stride_column) const {
    parallel(pool, kernels_, ceil_div(panels, kPanelGroup), [&](int64_t group) {
      for (int64_t panel = group * kPanelGroup; panel < std::min(panels, (group + 1) * kPanelGroup); ++panel)
        for (int64_t i = 0; i < rank; ++i) {
          float sums[kPanel] = {};
          add_splits(partial + (panel * ranks + first + i) * kPanel, panels * ranks * kPanel, kPanel, sums);
          float* dst = out + i * stride_rank + panel * kPanel * stride_column;
          for (int j = 0; j < columns(size, panel); ++j) dst[j * stride_column] = factor * sums[j];
        }
    });
  }

  static int columns(int64_t size, int64_t panel) {
    return static_cast<int>(std::min<int64_t>(kPanel, size - panel * kPanel));
  }
  const T* dy(int64_t member, int64_t m) const {
    return static_cast<const T*>(p_.members[member].dy) + m * p_.members[member].lddy;
  }
  const T* x(int64_t m) const { return static_cast<const T*>(p_.x) + m * p_.ldx; }

  const BackwardParams& p_;
  const Kernels<T, E>& kernels_;
  const int64_t width_;
  // The first member whose base product is ours; the number of members where there is none.
  int64_t first_packed_;
  const Blocks blocks_;
  const int64_t k_panels_, words_;
  const Panels<E> d_;
  std::vector<Member> members_;
  // Ranks whose dA is wanted, and groups of panels of N, of all members.
  int64_t ranks_ = 0, groups_ = 0;
  float *grad_p_, *partial_a_;
};

}  // namespace

void backward(const BackwardParams& params, const ThreadPool& pool) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Backward<float, float>(params).run(pool);
    case DType::kFloat16:
      return Backward<fp16, float>(params).run(pool);
    case DType::kBFloat16:
      if (kernels<bf16, bf16>()) return Backward<bf16, bf16>(params).run(pool);
      return Backward<bf16, float>(params).run(pool);
  }
}

}  // namespace loradash::cpu
