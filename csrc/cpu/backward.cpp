// Backward, with G = dy Q and c = [scaling ; dash_sigma]:
//   dx = dy W + mask * ((G * c) D) / (1 - p)    dA = scaling G_r^T dropout(x)    dB = scaling dy^T P_r
//   d(dash_sigma)_i = sum_m G_s P_s             db = sum_m dy
//
// FLOPs: 2 M N K + 2 M (R N + r N + r K + R K). Bytes: dy and x once, dx once, W once per block of rows. Per block of
// rows: one pass over dy gives G, dB and db while it enters L2; the mask is drawn once, for dA and for dx; the masked
// low-rank term joins a tile of dx while it is in cache.
// Sums over M are taken block after block into at most 16 partial sums, which are then added in order.
#include "blocking.h"

namespace loradash::cpu {
namespace {

template <typename T, typename E>
class Backward {
 public:
  Backward(const BackwardParams& params)
      : p_(params),
        kernels_(*kernels<T, E>()),
        rank_(params.adapters.rank),
        directions_(params.adapters.directions),
        width_(rank_ + directions_),
        blocks_(cut_rows<E>(params.shape.m, std::max(params.shape.n, params.shape.k))),
        n_panels_(ceil_div(params.shape.n, kPanel)),
        k_panels_(ceil_div(params.shape.k, kPanel)),
        words_(ceil_div(params.shape.k, 32)),
        q_(pack_q(kernels_, params.adapters, params.shape.n, true)),
        d_(pack_d(kernels_, params.adapters, params.shape.k, false)),
        w_{static_cast<const E*>(params.packed), params.packed ? padded_depth<E>(params.shape.n) : 0} {
    grad_p_ = scratch<float>(kGradP, p_.shape.m * width_);
    const int64_t per_split =
        (n_panels_ * (p_.db_lora ? rank_ : 0) + k_panels_ * (p_.da ? rank_ : 0) + (p_.dbias ? n_panels_ : 0)) * kPanel +
        (p_.dsigma ? directions_ : 0);
    float* partial = scratch<float>(kPartials, blocks_.splits * per_split);
    std::fill_n(partial, blocks_.splits * per_split, 0.0f);
    partial_b_ = partial, partial += p_.db_lora ? blocks_.splits * n_panels_ * rank_ * kPanel : 0;
    partial_a_ = partial, partial += p_.da ? blocks_.splits * k_panels_ * rank_ * kPanel : 0;
    partial_bias_ = partial, partial += p_.dbias ? blocks_.splits * n_panels_ * kPanel : 0;
    partial_sigma_ = partial;
  }

  void run(const ThreadPool& pool) const {
    if (blocks_.splits >= pool.threads)
      run_by_split(pool);
    else
      run_by_panel(pool);
    reduce(pool);
  }

 private:
  // Enough blocks for every thread: each takes whole blocks, whose dy and x stay in its L2.
  void run_by_split(const ThreadPool& pool) const {
    parallel(pool, kernels_, blocks_.splits, [&](int64_t split) {
      for_blocks(split, [&](int64_t m0, int64_t rows) {
        const RowOperand<E> dy = stage_dy(m0, rows);
        gradient_of_p(m0, rows, dy);
        gradient_of_sigma(split, m0, rows);
        gradient_of_b(split, m0, rows, 0, n_panels_);
        const uint32_t* bits = draw_mask(m0, rows, 0, k_panels_);
        gradient_of_a(split, m0, rows, 0, k_panels_, bits, words_);
        gradient_of_x(m0, rows, dy, 0, k_panels_, bits, words_);
      });
    });
  }

  // Few rows: threads share the columns of a block. The mask is drawn once per group of panels and use.
  void run_by_panel(const ThreadPool& pool) const {
    const int64_t tiles = ceil_div(p_.shape.m, kernels_.tile_rows);
    const int64_t n_groups = ceil_div(n_panels_, kPanelGroup), k_groups = ceil_div(k_panels_, kPanelGroup);
    parallel(pool, kernels_, tiles, [&](int64_t tile) {
      const int64_t m0 = tile * kernels_.tile_rows, rows = std::min<int64_t>(kernels_.tile_rows, p_.shape.m - m0);
      gradient_of_p(m0, rows, stage_dy(m0, rows));
    });
    parallel(pool, kernels_, blocks_.splits * n_groups, [&](int64_t task) {
      const int64_t split = task / n_groups, first = task % n_groups * kPanelGroup;
      for_blocks(split, [&](int64_t m0, int64_t rows) {
        if (first == 0) gradient_of_sigma(split, m0, rows);
        gradient_of_b(split, m0, rows, first, std::min(n_panels_, first + kPanelGroup));
      });
    });
    parallel(pool, kernels_, blocks_.splits * k_groups, [&](int64_t task) {
      const int64_t split = task / k_groups, first = task % k_groups * kPanelGroup;
      const int64_t last = std::min(k_panels_, first + kPanelGroup);
      for_blocks(split, [&](int64_t m0, int64_t rows) {
        const uint32_t* bits = draw_mask(m0, rows, first, last);
        gradient_of_a(split, m0, rows, first, last, bits, last - first);
        gradient_of_x(m0, rows, stage_dy(m0, rows), first, last, bits, last - first);
      });
    });
  }

  template <typename F>
  void for_blocks(int64_t split, const F& body) const {
    for (int64_t block = blocks_.split_begin(split); block < blocks_.split_begin(split + 1); ++block)
      body(blocks_.begin(block), blocks_.size(block));
  }

  bool needs_mask() const { return p_.dropout.active() && width_ && (p_.da || p_.dx); }

  // Returns words of keep bits, one for each row and panel of 32 columns.
  const uint32_t* draw_mask(int64_t m0, int64_t rows, int64_t first, int64_t last) const {
    if (!needs_mask()) return nullptr;
    uint32_t* bits = scratch<uint32_t>(kBits, rows * (last - first));
    kernels_.dropout_bits(p_.dropout, m0, rows, first * kPanel, std::min(p_.shape.k, last * kPanel), bits,
                          last - first);
    return bits;
  }

  // dy is the left operand of dy Q and dy W.
  RowOperand<E> stage_dy(int64_t m0, int64_t rows) const {
    return row_operand(kernels_, dy(m0), p_.lddy, rows, p_.shape.n, nullptr, 0);
  }

  // G (rows, R) = dy Q
  void gradient_of_p(int64_t m0, int64_t rows, RowOperand<E> dy) const {
    if (width_) multiply_narrow(kernels_, dy, rows, q_, width_, 1.0f, grad_p_ + m0 * width_);
  }

  void gradient_of_sigma(int64_t split, int64_t m0, int64_t rows) const {
    if (!p_.dsigma) return;
    for (int64_t i = 0; i < directions_; ++i) {
      double sum = 0;
      for (int64_t m = m0; m < m0 + rows; ++m)
        sum += static_cast<double>(grad_p_[m * width_ + rank_ + i]) * p_.p[m * width_ + rank_ + i];
      partial_sigma_[split * directions_ + i] += static_cast<float>(sum);
    }
  }

  // partial (panel, r, 32) += P_r^T dy, and column sums of dy
  void gradient_of_b(int64_t split, int64_t m0, int64_t rows, int64_t first, int64_t last) const {
    const int64_t n = p_.shape.n;
    if (p_.dbias)
      for (int64_t panel = first; panel < last; ++panel)
        kernels_.column_sums(dy(m0) + panel * kPanel, p_.lddy, rows, columns(n, panel),
                             partial_bias_ + (split * n_panels_ + panel) * kPanel);
    if (p_.db_lora)
      gradient_of_factor(p_.p + m0 * width_, rows, dy(m0), p_.lddy, n, first, last, nullptr, 0,
                         partial_b_ + split * n_panels_ * rank_ * kPanel);
  }

  // partial (panel, r, 32) += G_r^T (mask * x)
  void gradient_of_a(int64_t split, int64_t m0, int64_t rows, int64_t first, int64_t last, const uint32_t* bits,
                     int64_t bits_stride) const {
    if (p_.da)
      gradient_of_factor(grad_p_ + m0 * width_, rows, x(m0), p_.ldx, p_.shape.k, first, last, bits, bits_stride,
                         partial_a_ + split * k_panels_ * rank_ * kPanel);
  }

  // partial (panel, r, 32) += narrow (rows, R)[:, :r]^T wide (rows, 32), for panels first to last; `bits`
  // begin at panel `first`. It takes a few rows at a time: a panel is 128 bytes of each, and more rows than the TLB has
  // pages would miss on every one.
  void gradient_of_factor(const float* narrow, int64_t rows, const T* wide, int64_t ld, int64_t size, int64_t first,
                          int64_t last, const uint32_t* bits, int64_t bits_stride, float* partial) const {
    constexpr int64_t kRows = 64;
    const int64_t pitch = tile_pitch<E>(kRows);
    E* transposed = scratch<E>(kSmall, rank_ * pitch);
    const RowOperand<E> a{transposed, pitch};
    E* staged = scratch<E>(kStagedPanel, kRows * kPanel);
    for (int64_t m = 0; m < rows; m += kRows) {
      const int64_t count = std::min(kRows, rows - m), depth = padded_depth<E>(count);
      for_tiles(kernels_, rank_, [&](int64_t i, int height) {
        kernels_.transpose_tile(narrow + m * width_ + i, width_, count, height, pitch, transposed + i * pitch);
      });
      for (int64_t panel = first; panel < last; ++panel) {
        const T* src = wide + m * ld + panel * kPanel;
        const uint32_t* words = bits ? bits + m * bits_stride + panel - first : nullptr;
        Term<E> term{nullptr, a.ld, staged, kPanel, depth, nullptr, 0};
        if constexpr (std::is_same_v<T, E> && std::is_same_v<E, float>)
          // Rows of memory will do as they are.
          if (!words && columns(size, panel) == kPanel) term.b = src, term.ldb = ld;
        if (term.b == staged) kernels_.stage_panel(src, ld, count, columns(size, panel), words, bits_stride, staged);
        float* sums = partial + panel * rank_ * kPanel;
        for_tiles(kernels_, rank_, [&](int64_t i, int height) {
          term.a = a.at(i, height, 0);
          kernels_.multiply(&term, 1, height, sums + i * kPanel, true);
        });
      }
    }
  }

  // dx (rows, panels) = dy W + the masked low-rank term
  void gradient_of_x(int64_t m0, int64_t rows, RowOperand<E> dy, int64_t first, int64_t last, const uint32_t* bits,
                     int64_t bits_stride) const {
    if (!p_.dx) return;
    const int64_t k = p_.shape.k;
    float* factors = scratch<float>(kFactors, width_);
    column_factors(p_.adapters, p_.dropout.keep_scale(), factors);
    const RowOperand<E> scaled = scaled_operand(kernels_, grad_p_ + m0 * width_, rows, width_, factors);
    float* c = scratch<float>(kTiles, rows * kPanel);
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
      multiply_block(kernels_, scaled, d_, dy, w_, panel, rows, bits ? bits + panel - first : nullptr, bits_stride, c,
                     fetch, store);
    }
  }

  // The second stage of the sums over M adds the splits in order and writes the gradients in their layouts.
  void reduce(const ThreadPool& pool) const {
    const float scaling = p_.adapters.scaling;
    if (p_.db_lora) reduce_factor(pool, partial_b_, n_panels_, p_.shape.n, scaling, p_.db_lora, 1, rank_);
    if (p_.da)
      reduce_factor(pool, partial_a_, k_panels_, p_.shape.k, scaling * p_.dropout.keep_scale(), p_.da, p_.shape.k, 1);
    if (p_.dbias) {
      std::fill_n(p_.dbias, p_.shape.n, 0.0f);
      add_splits(partial_bias_, n_panels_ * kPanel, p_.shape.n, p_.dbias);
    }
    if (p_.dsigma) {
      std::fill_n(p_.dsigma, directions_, 0.0f);
      add_splits(partial_sigma_, directions_, directions_, p_.dsigma);
    }
  }

  // Adds to out (count) the partial sums of every split, which lie `stride` apart.
  void add_splits(const float* partial, int64_t stride, int64_t count, float* out) const {
    for (int64_t split = 0; split < blocks_.splits; ++split)
      for (int64_t j = 0; j < count; ++j) out[j] += partial[split * stride + j];
  }

  // out[i * stride_rank + column * stride_column] = factor * sum over splits of partial (panel, r, 32).
  void reduce_factor(const ThreadPool& pool, const float* partial, int64_t panels, int64_t size, float factor,
                     float* out, int64_t stride_rank, int64_t stride_column) const {
    parallel(pool, kernels_, ceil_div(panels, kPanelGroup), [&](int64_t group) {
      for (int64_t panel = group * kPanelGroup; panel < std::min(panels, (group + 1) * kPanelGroup); ++panel)
        for (int64_t i = 0; i < rank_; ++i) {
          float sums[kPanel] = {};
          add_splits(partial + (panel * rank_ + i) * kPanel, panels * rank_ * kPanel, kPanel, sums);
          float* dst = out + i * stride_rank + panel * kPanel * stride_column;
          for (int j = 0; j < columns(size, panel); ++j) dst[j * stride_column] = factor * sums[j];
        }
    });
  }

  static int columns(int64_t size, int64_t panel) {
    return static_cast<int>(std::min<int64_t>(kPanel, size - panel * kPanel));
  }
  const T* dy(int64_t m) const { return static_cast<const T*>(p_.dy) + m * p_.lddy; }
  const T* x(int64_t m) const { return static_cast<const T*>(p_.x) + m * p_.ldx; }

  const BackwardParams& p_;
  const Kernels<T, E>& kernels_;
  const int64_t rank_, directions_, width_;
  const Blocks blocks_;
  const int64_t n_panels_, k_panels_, words_;
  const Panels<E> q_, d_, w_;
  float *grad_p_, *partial_b_, *partial_a_, *partial_bias_, *partial_sigma_;
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
