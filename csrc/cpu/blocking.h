// What the forward and the backward driver share: how rows are cut into blocks and tiles, scratch memory, packing of
// the adapters, and the product of a block of rows with a packed matrix.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "kernels.h"

namespace loradash::cpu {

// --- scratch ---------------------------------------------------------------------------------------------------------

// Memory that a thread keeps between calls: allocating megabytes in every call costs a page fault per 4 KB.
enum Slot { kPackedD, kPackedQ, kGradP, kPartials, kBits, kStaged, kSmall, kTile, kPanelB, kSlots };

template <typename X>
X* scratch(Slot slot, int64_t count) {
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[kSlots];
  Buffer& buffer = buffers[slot];
  const size_t bytes = (sizeof(X) * std::max<int64_t>(count, 1) + 63) / 64 * 64;
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    buffer.data = std::aligned_alloc(64, bytes);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return static_cast<X*>(buffer.data);
}

// --- blocks of rows --------------------------------------------------------------------------------------------------

// Cutting depends on the shape alone, never on the number of threads: sums over M are the same bits for any.
struct Blocks {
  int64_t m, rows, count, splits;

  int64_t begin(int64_t block) const { return block * rows; }
  int64_t size(int64_t block) const { return std::min(rows, m - begin(block)); }
  int64_t split_begin(int64_t split) const { return count * split / splits; }
};

// A block of A stays in L2 while the panels of B pass: 1 MB of bf16; fp32, four times slower per byte, may use L3.
template <typename E>
Blocks cut_rows(int64_t m, int64_t depth, int tile_rows) {
  constexpr int64_t kMaxRows = 256, kMaxSplits = 16, kBytes = sizeof(E) == 2 ? 1 << 20 : 4 << 20;
  const int64_t fit = std::clamp<int64_t>(kBytes / (sizeof(E) * std::max<int64_t>(depth, 1)), 4 * tile_rows, kMaxRows);
  const int64_t rows = fit / tile_rows * tile_rows, count = ceil_div(m, rows);
  return {m, rows, count, std::min(count, kMaxSplits)};
}

// Calls body(first row, rows) for the tiles of a block.
template <typename K, typename F>
void for_tiles(const K& kernels, int64_t rows, const F& body) {
  const int64_t tiles = ceil_div(rows, kernels.tile_rows);
  const int64_t height = kernels.even_tiles && tiles ? ceil_div(rows, tiles) : kernels.tile_rows;
  for (int64_t i = 0; i < rows; i += height) body(i, static_cast<int>(std::min(height, rows - i)));
}

// --- operands --------------------------------------------------------------------------------------------------------

// A block of rows as the left operand of a product: memory itself where it will do, else a staged copy.
template <typename E>
struct RowOperand {
  const E* data;
  int64_t ld;
};

template <typename T, typename E>
RowOperand<E> row_operand(const Kernels<T, E>& kernels, const T* src, int64_t ld, int64_t rows, int64_t k,
                          const uint32_t* bits, int64_t bits_stride) {
  if constexpr (std::is_same_v<T, E>)
    if (!bits && k % kDepthStep<E> == 0) return {src, ld};
  const int64_t padded = padded_depth<E>(k);
  E* staged = scratch<E>(kStaged, rows * padded);
  kernels.stage_rows(src, ld, static_cast<int>(rows), k, bits, bits_stride, staged);
  return {staged, padded};
}

// A packed matrix of fp32 blocks, built once per call; zero where no block is put.
template <typename T, typename E>
class PackedAdapters {
 public:
  PackedAdapters(const Kernels<T, E>& kernels, Slot slot, int64_t depth, int64_t columns)
      : kernels_(kernels), depth_(padded_depth<E>(depth)) {
    const int64_t count = depth_ * ceil_div(columns, kPanel) * kPanel;
    data_ = scratch<E>(slot, count);
    std::fill_n(data_, count, E{});
  }
  void put(const float* src, int64_t stride_d, int64_t stride_c, int64_t depth, int64_t columns, int64_t d0, int64_t c0) {
    kernels_.pack_block(src, stride_d, stride_c, depth, columns, depth_, d0, c0, data_);
  }
  const E* panel(int64_t index) const { return data_ + index * depth_ * kPanel; }
  int64_t depth() const { return depth_; }

 private:
  const Kernels<T, E>& kernels_;
  int64_t depth_;
  E* data_;
};

// D = [A; Vt] with depth K (for x D^T) or depth R (for G D); Q = [B | U] with depth R (for P Q^T) or N (for dy Q).
template <typename T, typename E>
PackedAdapters<T, E> pack_d(const Kernels<T, E>& kernels, const Adapters& a, int64_t k, bool depth_is_k) {
  PackedAdapters<T, E> packed(kernels, kPackedD, depth_is_k ? k : a.width(), depth_is_k ? a.width() : k);
  if (depth_is_k) {
    packed.put(a.lora_a, 1, k, k, a.rank, 0, 0);
    packed.put(a.dash_vt, 1, k, k, a.directions, 0, a.rank);
  } else {
    packed.put(a.lora_a, k, 1, a.rank, k, 0, 0);
    packed.put(a.dash_vt, k, 1, a.directions, k, a.rank, 0);
  }
  return packed;
}

template <typename T, typename E>
PackedAdapters<T, E> pack_q(const Kernels<T, E>& kernels, const Adapters& a, int64_t n, bool depth_is_n) {
  PackedAdapters<T, E> packed(kernels, kPackedQ, depth_is_n ? n : a.width(), depth_is_n ? a.width() : n);
  if (depth_is_n) {
    packed.put(a.lora_b, a.rank, 1, n, a.rank, 0, 0);
    packed.put(a.dash_u, a.directions, 1, n, a.directions, 0, a.rank);
  } else {
    packed.put(a.lora_b, 1, a.rank, a.rank, n, 0, 0);
    packed.put(a.dash_u, 1, a.directions, a.directions, n, a.rank, 0);
  }
  return packed;
}

// c = [scaling * 1_r ; dash_sigma] * factor, in a caller's array of R.
inline void column_factors(const Adapters& a, float factor, float* c) {
  for (int64_t i = 0; i < a.rank; ++i) c[i] = a.scaling * factor;
  for (int64_t i = 0; i < a.directions; ++i) c[a.rank + i] = a.dash_sigma[i] * factor;
}

// --- products --------------------------------------------------------------------------------------------------------

// Depth of one pass over a panel. 512 rows of bf16 pairs (32 KB) stay in L1 while the tiles of a block pass over them;
// the fp32 product is not bound by loads and runs through.
template <typename E>
constexpr int64_t kDepthBlock = sizeof(E) == 2 ? 512 : int64_t{1} << 40;

// c (rows, kPanel) = (accumulate ? c : 0) + a (rows, depth) * panel.
template <typename T, typename E>
void multiply_block(const Kernels<T, E>& kernels, RowOperand<E> a, int64_t rows, const E* panel, int64_t depth, float* c,
                    bool accumulate) {
  for (int64_t d = 0; d < depth; d += kDepthBlock<E>) {
    const int64_t width = std::min(kDepthBlock<E>, depth - d);
    for_tiles(kernels, rows, [&](int64_t i, int height) {
      kernels.multiply(a.data + i * a.ld + d, a.ld, height, panel + d * kPanel, width, c + i * kPanel,
                       accumulate || d > 0);
    });
  }
}

// out (rows, columns) = a * packed * factor, for the narrow products x D^T and dy Q.
template <typename T, typename E>
void multiply_narrow(const Kernels<T, E>& kernels, RowOperand<E> a, int64_t rows, const PackedAdapters<T, E>& packed,
                     int64_t columns, float factor, float* out) {
  alignas(64) float c[kMaxTile * kPanel];
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, columns - j);
    for_tiles(kernels, rows, [&](int64_t i, int height) {
      kernels.multiply(a.data + i * a.ld, a.ld, height, packed.panel(j / kPanel), packed.depth(), c, false);
      for (int r = 0; r < height; ++r)
        for (int64_t l = 0; l < width; ++l) out[(i + r) * columns + j + l] = c[r * kPanel + l] * factor;
    });
  }
}

// --- tasks -----------------------------------------------------------------------------------------------------------

// Runs body(index) for every index below count on the caller's pool, with the instruction set's state around it.
template <typename K, typename F>
void parallel(const ThreadPool& pool, const K& kernels, int64_t count, const F& body) {
  struct Context {
    const K& kernels;
    const F& body;
  } context{kernels, body};
  const auto call = [](void* data, int64_t index) {
    const Context& c = *static_cast<Context*>(data);
    c.kernels.enter();
    c.body(index);
    c.kernels.leave();
  };
  if (count == 1)
    call(&context, 0);
  else if (count > 1)
    pool.run(count, call, &context);
}

// Panels that one task computes when a block of rows is shared between threads: 256 columns.
constexpr int64_t kPanelGroup = 8;

}  // namespace loradash::cpu
