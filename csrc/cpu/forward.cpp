// Forward: y = x W^T + b + (P * c) Q^T with P = dropout(x) D^T.
//
// FLOPs: 2 M K N + 2 M R (K + N). Bytes: x once (twice where a block of it leaves L2), W once per block of rows, y
// once, P once. The rank columns are a second product into the same tile of C, in cache: y is neither read nor rounded
// twice.
#include "blocking.h"

namespace loradash::cpu {
namespace {

template <typename T, typename E>
class Forward {
 public:
  Forward(const ForwardParams& params)
      : p_(params),
        kernels_(*kernels<T, E>()),
        width_(params.adapters.width()),
        blocks_(cut_rows<E>(params.shape.m, params.shape.k)),
        panels_(ceil_div(params.shape.n, kPanel)),
        d_(pack_d(kernels_, params.adapters, params.shape.k, true)),
        q_(pack_q(kernels_, params.adapters, params.shape.n, false)),
        w_{static_cast<const E*>(params.packed), params.packed ? padded_depth<E>(params.shape.k) : 0} {}

  void run(const ThreadPool& pool) const {
    // A block at a time where every thread gets one: x is still in L2 when its base product starts.
    if (blocks_.count >= pool.threads) {
      parallel(pool, kernels_, blocks_.count, [&](int64_t block) {
        const int64_t m0 = blocks_.begin(block), rows = blocks_.size(block);
        down(m0, rows);
        up(m0, rows, 0, panels_);
      });
      return;
    }
    const int64_t tiles = ceil_div(p_.shape.m, kernels_.tile_rows), groups = ceil_div(panels_, kPanelGroup);
    parallel(pool, kernels_, tiles, [&](int64_t tile) {
      const int64_t m0 = tile * kernels_.tile_rows;
      down(m0, std::min<int64_t>(kernels_.tile_rows, p_.shape.m - m0));
    });
    parallel(pool, kernels_, blocks_.count * groups, [&](int64_t task) {
      const int64_t block = task % blocks_.count, first = task / blocks_.count * kPanelGroup;
      up(blocks_.begin(block), blocks_.size(block), first, std::min(panels_, first + kPanelGroup));
    });
  }

 private:
  // P (rows, R) = dropout(x) D^T, a tile of x at a time.
  void down(int64_t m0, int64_t rows) const {
    if (width_ == 0) return;
    const int64_t k = p_.shape.k, words = ceil_div(k, 32);
    uint32_t* bits = nullptr;
    if (p_.dropout.active()) {
      bits = scratch<uint32_t>(kBits, rows * words);
      kernels_.dropout_bits(p_.dropout, m0, rows, 0, k, bits, words);
    }
    for_tiles(kernels_, rows, [&](int64_t i, int height) {
      const RowOperand<E> a =
          row_operand(kernels_, x(m0 + i), p_.ldx, height, k, bits ? bits + i * words : nullptr, words);
      multiply_narrow(kernels_, a, height, d_, width_, p_.dropout.keep_scale(), p_.p + (m0 + i) * width_);
    });
  }

  // y (rows, panels) = base product, rank columns, bias.
  void up(int64_t m0, int64_t rows, int64_t first, int64_t last) const {
    const int64_t n = p_.shape.n;
    float* factors = scratch<float>(kFactors, width_);
    column_factors(p_.adapters, 1.0f, factors);
    const RowOperand<E> scaled = scaled_operand(kernels_, p_.p + m0 * width_, rows, width_, factors);
    RowOperand<E> a{};
    if (p_.packed) a = row_operand(kernels_, x(m0), p_.ldx, rows, p_.shape.k, nullptr, 0);
    float* c = scratch<float>(kTiles, rows * kPanel);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t n0 = panel * kPanel, y0 = m0 * n + n0;
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, n - n0));
      const auto store = [&](int64_t i, int height, const float* tile) {
        kernels_.store_tile(tile, height, columns, p_.bias ? p_.bias + n0 : nullptr,
                            p_.base ? static_cast<const T*>(p_.base) + y0 + i * n : nullptr,
                            static_cast<T*>(p_.y) + y0 + i * n, n);
      };
      const auto fetch = [&](int64_t i, int height) {
        fetch_tile(static_cast<T*>(p_.y) + y0 + i * n, n, height, columns);
      };
      multiply_block(kernels_, scaled, q_, a, w_, panel, rows, nullptr, 0, c, fetch, store);
    }
  }

  const T* x(int64_t m) const { return static_cast<const T*>(p_.x) + m * p_.ldx; }

  const ForwardParams& p_;
  const Kernels<T, E>& kernels_;
  const int64_t width_;
  const Blocks blocks_;
  const int64_t panels_;
  const Panels<E> d_, q_, w_;
};

}  // namespace

void forward(const ForwardParams& params, const ThreadPool& pool) {
  if (params.shape.m == 0) return;
  switch (params.dtype) {
    case DType::kFloat32:
      return Forward<float, float>(params).run(pool);
    case DType::kFloat16:
      return Forward<fp16, float>(params).run(pool);
    case DType::kBFloat16:
      if (kernels<bf16, bf16>()) return Forward<bf16, bf16>(params).run(pool);
      return Forward<bf16, float>(params).run(pool);
  }
}

}  // namespace loradash::cpu
