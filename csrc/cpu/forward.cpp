// Forward: y = x W^T + b + (P * c) Q^T with P = dropout(x) D^T, for one layer or for several that read the same x.
//
// FLOPs: 2 M K N + 2 M R (K + N) of every member. Bytes: x once for all members (twice where a block of it leaves L2),
// W once per block of rows, y once, P once. The rank columns are a second product into the same tile of C, in cache: y
// is neither read nor rounded twice. The mask is drawn once, and x staged once per block for all the base products.
#include <vector>

#include "blocking.h"

namespace loradash::cpu {
namespace {

template <typename T, typename E>
class Forward {
 public:
  Forward(const ForwardParams& params)
      : p_(params),
        kernels_(*kernels<T, E>()),
        width_(total_width(params.members, params.count)),
        blocks_(cut_rows<E>(params.m, params.k)),
        d_(pack_d(kernels_, params.members, params.count, params.k, true)),
        members_(params.count) {
    pack_q(kernels_, p_.members, p_.count, false, [&](int64_t i, Panels<E> q) { members_[i].q = q; });
    for (int64_t i = 0, first = 0; i < p_.count; ++i) {
      const ForwardMember& given = p_.members[i];
      Member& member = members_[i];
      member.first = first, first += given.adapters.width();
      member.panels = ceil_div(given.n, kPanel), member.groups = ceil_div(member.panels, kPanelGroup);
      member.w = {static_cast<const E*>(given.packed), given.packed ? padded_depth<E>(p_.k) : 0};
      groups_ += member.groups;
      any_packed_ |= given.packed != nullptr;
    }
  }

  void run(const ThreadPool& pool) const {
    // A block at a time where every thread gets one: x is still in L2 when its base product starts.
    if (blocks_.count >= pool.threads) {
      parallel(pool, kernels_, blocks_.count, [&](int64_t block) {
        const int64_t m0 = blocks_.begin(block), rows = blocks_.size(block);
        down(m0, rows);
        const RowOperand<E> a = stage_x(m0, rows);
        for (int64_t i = 0; i < p_.count; ++i) up(i, m0, rows, a, 0, members_[i].panels);
      });
      return;
    }
    const int64_t tiles = ceil_div(p_.m, kernels_.tile_rows);
    parallel(pool, kernels_, tiles, [&](int64_t tile) {
      const int64_t m0 = tile * kernels_.tile_rows;
      down(m0, std::min<int64_t>(kernels_.tile_rows, p_.m - m0));
    });
    parallel(pool, kernels_, blocks_.count * groups_, [&](int64_t task) {
      const int64_t block = task % blocks_.count, m0 = blocks_.begin(block), rows = blocks_.size(block);
      int64_t i = 0, group = task / blocks_.count;
      while (group >= members_[i].groups) group -= members_[i++].groups;
      const int64_t first = group * kPanelGroup;
      up(i, m0, rows, stage_x(m0, rows), first, std::min(members_[i].panels, first + kPanelGroup));
    });
  }

 private:
  struct Member {
    // Its first column of P.
    int64_t first;
    int64_t panels, groups;
    Panels<E> q, w;
  };

  // P (rows, R) = dropout(x) D^T, a tile of x at a time.
  void down(int64_t m0, int64_t rows) const {
    if (width_ == 0) return;
    const int64_t k = p_.k, words = ceil_div(k, 32);
    uint32_t* bits = nullptr;
    if (p_.dropout.active()) {
      bits = scratch<uint32_t>(kBits, rows * words);
      kernels_.dropout_bits(p_.dropout, m0, rows, 0, k, bits, words);
    }
    E* staged = scratch<E>(kStaged, rows * tile_pitch<E>(k));
    for_tiles(kernels_, rows, [&](int64_t i, int height) {
      const RowOperand<E> a =
          row_operand(kernels_, x(m0 + i), p_.ldx, height, k, bits ? bits + i * words : nullptr, words, staged);
      multiply_narrow(kernels_, a, height, d_, width_, p_.dropout.keep_scale(), p_.p + (m0 + i) * width_, width_);
    });
  }

  // x is the left operand of every base product of ours.
  RowOperand<E> stage_x(int64_t m0, int64_t rows) const {
    if (!any_packed_) return {};
    E* staged = scratch<E>(kStaged, rows * tile_pitch<E>(p_.k));
    return row_operand(kernels_, x(m0), p_.ldx, rows, p_.k, nullptr, 0, staged);
  }

  // y (rows, panels) of a member = base product, rank columns, bias.
  void up(int64_t index, int64_t m0, int64_t rows, RowOperand<E> a, int64_t first, int64_t last) const {
    const ForwardMember& given = p_.members[index];
    const Member& member = members_[index];
    const int64_t n = given.n, width = given.adapters.width();
    float* factors = scratch<float>(kFactors, width);
    column_factors(given.adapters, 1.0f, factors);
    const RowOperand<E> scaled =
        scaled_operand(kernels_, p_.p + m0 * width_ + member.first, width_, rows, width, factors);
    const Sum<E> sum{{a, member.w}, false, true, scaled, member.q};
    float* c = scratch<float>(kTiles, rows * kPanel);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t n0 = panel * kPanel, y0 = m0 * n + n0;
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, n - n0));
      const auto store = [&](int64_t i, int height, const float* tile) {
        kernels_.store_tile(tile, height, columns, given.bias ? given.bias + n0 : nullptr,
                            given.base ? static_cast<const T*>(given.base) + y0 + i * n : nullptr,
                            static_cast<T*>(given.y) + y0 + i * n, n);
      };
      const auto fetch = [&](int64_t i, int height) {
        fetch_tile(static_cast<T*>(given.y) + y0 + i * n, n, height, columns);
      };
      multiply_block(kernels_, sum, panel, rows, nullptr, 0, c, fetch, store);
    }
  }

  const T* x(int64_t m) const { return static_cast<const T*>(p_.x) + m * p_.ldx; }

  const ForwardParams& p_;
  const Kernels<T, E>& kernels_;
  const int64_t width_;
  const Blocks blocks_;
  const Panels<E> d_;
  std::vector<Member> members_;
  int64_t groups_ = 0;
  bool any_packed_ = false;
};

}  // namespace

void forward(const ForwardParams& params, const ThreadPool& pool) {
  if (params.m == 0) return;
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
