// What the forward and the backward driver share: how rows are cut into blocks and tiles, scratch memory, packing of
// the adapters, and the product of a block of rows with a packed matrix.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "kernels.h"

namespace loradash::cpu {

// Memory that a thread keeps between calls: allocating megabytes in every call costs a page fault per 4 KB.
enum Slot {
  kPackedD,
  kPackedQ,
  kGradP,
  kPartials,
  kBits,
  kStaged,
  kStagedPanel,
  kSmall,
  kFactors,
  kTiles,
  kRanks,
  kSlots
};

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

// Cutting depends on the shape alone, never on the number of threads: sums over M are the same bits for any.
struct Blocks {
  int64_t m, rows, count, splits;

  int64_t begin(int64_t block) const { return block * rows; }
  int64_t size(int64_t block) const { return std::min(rows, m - begin(block)); }
  int64_t split_begin(int64_t split) const { return count * split / splits; }
};

// Rows of a block, measured at depths 768 to 4096. bf16: 512 KB of A stay in L2 while the panels of B pass. fp32: deep
// panels cost more to stream than A does, so the block grows with the depth.
template <typename E>
int64_t block_rows(int64_t depth) {
  return (sizeof(E) == 2) == (depth < 2048) ? 256 : 128;
}

// Blocks are of equal size: a short one would stream all of B for a few rows.
template <typename E>
Blocks cut_rows(int64_t m, int64_t depth) {
  constexpr int64_t kMaxSplits = 16;
  const int64_t fit = block_rows<E>(depth), wanted = std::max<int64_t>(1, (m + fit / 2) / fit);
  const int64_t rows = std::max<int64_t>(1, padded_depth<E>(ceil_div(m, wanted)));
  const int64_t count = ceil_div(m, rows);
  return {m, rows, count, std::min(count, kMaxSplits)};
}

// Calls body(first row, rows) for the tiles of a block.
template <typename K, typename F>
void for_tiles(const K& kernels, int64_t rows, const F& body) {
  const int64_t tiles = ceil_div(rows, kernels.tile_rows);
  const int64_t height = kernels.even_tiles && tiles ? ceil_div(rows, tiles) : kernels.tile_rows;
  for (int64_t i = 0; i < rows; i += height) body(i, static_cast<int>(std::min(height, rows - i)));
}

// A block of rows is the left operand of a product: memory itself where it will do, else staged tiles. The tile that
// starts at row i is at data + i * ld; a step of depth is one element of bf16, or as many of fp32 as the tile has rows.
template <typename E>
struct RowOperand {
  const E* data;
  int64_t ld;

  const E* at(int64_t row, int height, int64_t d) const { return data + row * ld + d * (sizeof(E) == 2 ? 1 : height); }
};

// `staged` has room for rows of tile_pitch<E>(k).
template <typename T, typename E>
RowOperand<E> row_operand(const Kernels<T, E>& kernels, const T* src, int64_t ld, int64_t rows, int64_t k,
                          const uint32_t* bits, int64_t bits_stride, E* staged) {
  // bf16 operands are read row by row, and T is bf16 too.
  if constexpr (std::is_same_v<E, bf16>)
    if (!bits && k % kDepthStep<E> == 0) return {src, ld};
  const int64_t pitch = tile_pitch<E>(k);
  for_tiles(kernels, rows, [&](int64_t i, int height) {
    kernels.stage_tile(src + i * ld, ld, height, k, bits ? bits + i * bits_stride : nullptr, bits_stride,
                       staged + i * pitch);
  });
  return {staged, pitch};
}

// Stages a block of rows (rows, width) of P or G, times one factor a column.
template <typename T, typename E>
RowOperand<E> scaled_operand(const Kernels<T, E>& kernels, const float* src, int64_t ld, int64_t rows, int64_t width,
                             const float* factors) {
  const int64_t pitch = tile_pitch<E>(width);
  E* staged = scratch<E>(kSmall, rows * pitch);
  for_tiles(kernels, rows, [&](int64_t i, int height) {
    kernels.scale_tile(src + i * ld, ld, height, width, factors, staged + i * pitch);
  });
  return {staged, pitch};
}

// The right operand of a product is panels of equal depth, one after the other.
template <typename E>
struct Panels {
  const E* data;
  int64_t depth;

  const E* at(int64_t panel) const { return data + panel * depth * kPanel; }
};

// R of all members.
template <typename Member>
int64_t total_width(const Member* members, int64_t count) {
  int64_t width = 0;
  for (int64_t i = 0; i < count; ++i) width += members[i].adapters.width();
  return width;
}

template <typename E>
int64_t panels_size(int64_t depth, int64_t columns) {
  return padded_depth<E>(depth) * ceil_div(columns, kPanel) * kPanel;
}

// Packs D = [A; Vt] of all members as right operand with depth K (for x D^T) or depth R (for G D), once per call.
template <typename T, typename E, typename Member>
Panels<E> pack_d(const Kernels<T, E>& kernels, const Member* members, int64_t count, int64_t k, bool depth_is_k) {
  const int64_t width = total_width(members, count), depth = padded_depth<E>(depth_is_k ? k : width);
  const int64_t size = panels_size<E>(depth, depth_is_k ? width : k);
  E* data = scratch<E>(kPackedD, size);
  std::fill_n(data, size, E{});
  const auto pack = [&](const float* rows, int64_t first, int64_t number) {
    if (depth_is_k)
      kernels.pack_block(rows, 1, k, k, number, depth, 0, first, data);
    else
      kernels.pack_block(rows, k, 1, number, k, depth, first, 0, data);
  };
  for (int64_t i = 0, first = 0; i < count; first += members[i++].adapters.width()) {
    const Fp32Adapters& a = members[i].adapters;
    pack(a.lora_a, first, a.rank);
    pack(a.dash_vt, first + a.rank, a.directions);
  }
  return {data, depth};
}

// Packs the Q = [B | U] of every member as right operand with depth R (for P Q^T) or depth N (for dy Q); calls
// take(member, panels).
template <typename T, typename E, typename Member, typename Take>
void pack_q(const Kernels<T, E>& kernels, const Member* members, int64_t count, bool depth_is_n, const Take& take) {
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = members[i].n, width = members[i].adapters.width();
    size += depth_is_n ? panels_size<E>(n, width) : panels_size<E>(width, n);
  }
  E* data = scratch<E>(kPackedQ, size);
  std::fill_n(data, size, E{});
  for (int64_t i = 0; i < count; ++i) {
    const Fp32Adapters& a = members[i].adapters;
    const int64_t n = members[i].n, depth = padded_depth<E>(depth_is_n ? n : a.width());
    if (depth_is_n) {
      kernels.pack_block(a.lora_b, a.rank, 1, n, a.rank, depth, 0, 0, data);
      kernels.pack_block(a.dash_u, a.directions, 1, n, a.directions, depth, 0, a.rank, data);
    } else {
      kernels.pack_block(a.lora_b, 1, a.rank, a.rank, n, depth, 0, 0, data);
      kernels.pack_block(a.dash_u, 1, a.directions, a.directions, n, depth, a.rank, 0, data);
    }
    take(i, Panels<E>{data, depth});
    data += panels_size<E>(depth, depth_is_n ? a.width() : n);
  }
}

// Writes c = [scaling * 1_r ; dash_sigma] * factor into a caller's array of R.
inline void column_factors(const Fp32Adapters& a, float factor, float* c) {
  for (int64_t i = 0; i < a.rank; ++i) c[i] = a.scaling * factor;
  for (int64_t i = 0; i < a.directions; ++i) c[a.rank + i] = a.dash_sigma[i] * factor;
}

// Depth of one pass over a panel: 256 rows of bf16 (16 KB) stay in L1 while the tiles of a block pass over them; fp32
// panels stream from L2.
template <typename E>
constexpr int64_t kDepthBlock = sizeof(E) == 2 ? 256 : 1024;

// Fetches the lines of a tile of the output while its product is computed: a store to a line that is not in L1 waits.
template <typename T>
void fetch_tile(const T* dst, int64_t ld, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; j += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(dst + i * ld + j, 1);
}

// One base product of a tile: a block of rows times a packed weight, of depth 0 where there is none.
template <typename E>
struct BaseProduct {
  RowOperand<E> a;
  Panels<E> b;
};

// One base product of a sum. What goes before it is in c if `begun`; where it `ends` the sum, the low-rank terms
// follow.
template <typename E>
struct Sum {
  BaseProduct<E> base;
  bool begun = false, ends = true;
  RowOperand<E> low_a = {};
  Panels<E> low_b = {};
};

// Adds the base and the low-rank terms of a block of rows and a panel: c = (c +) base_a base_b (+ mask * (low_a
// low_b)), in this order (the rank columns are few and large: a running sum that began with them would round every one
// of the many small base products at their magnitude), a tile at a time. Where the sum ends, finish(i, height, c) takes
// each, and prepare(i, height) is called when its last pass begins. `c` has room for the block. While the tiles of a
// block pass over a part of the base panel, each fetches its share of the part that follows.
template <typename T, typename E, typename Prepare, typename Finish>
void multiply_block(const Kernels<T, E>& kernels, const Sum<E>& sum, int64_t panel, int64_t rows, const uint32_t* bits,
                    int64_t bits_stride, float* c, const Prepare& prepare, const Finish& finish) {
  const BaseProduct<E>& base = sum.base;
  const int64_t tiles = ceil_div(rows, kernels.tile_rows), depth = base.b.depth;
  // In one pass the first tile of c serves all.
  const bool one_pass = !sum.begun && sum.ends && depth <= kDepthBlock<E>;
  const int64_t next_step = ceil_div(kPanel * static_cast<int64_t>(sizeof(E)), tiles);
  for (int64_t d = 0; d == 0 || d < depth; d += kDepthBlock<E>) {
    const int64_t width = std::min(kDepthBlock<E>, depth - d);
    const E* part = base.b.at(panel) + d * kPanel;
    const bool last = sum.ends && d + width == depth;
    const char* next = reinterpret_cast<const char*>(part + width * kPanel);
    for_tiles(kernels, rows, [&](int64_t i, int height) {
      float* tile = one_pass ? c : c + i * kPanel;
      Term<E> terms[2] = {{base.a.at(i, height, d), base.a.ld, part, kPanel, width, next, next_step}, {}};
      next += width * next_step;
      if (last) {
        terms[1] = {sum.low_a.at(i, height, 0), sum.low_a.ld, sum.low_b.at(panel), kPanel, sum.low_b.depth, nullptr, 0};
        prepare(i, height);
      }
      kernels.multiply(terms, last && !bits ? 2 : 1, height, tile, d > 0 || sum.begun);
      if (last && bits) {
        alignas(64) float low[kMaxTile * kPanel];
        kernels.multiply(terms + 1, 1, height, low, false);
        kernels.add_masked(low, height, bits + i * bits_stride, bits_stride, tile);
      }
      if (last) finish(i, height, tile);
    });
  }
}

// out (rows, columns), its rows ld apart, = a * b * factor, for the narrow products x D^T and dy Q.
template <typename T, typename E>
void multiply_narrow(const Kernels<T, E>& kernels, RowOperand<E> a, int64_t rows, Panels<E> b, int64_t columns,
                     float factor, float* out, int64_t ld) {
  alignas(64) float c[kMaxTile * kPanel];
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t width = std::min<int64_t>(kPanel, columns - j);
    for_tiles(kernels, rows, [&](int64_t i, int height) {
      const Term<E> term{a.at(i, height, 0), a.ld, b.at(j / kPanel), kPanel, b.depth, nullptr, 0};
      kernels.multiply(&term, 1, height, c, false);
      for (int r = 0; r < height; ++r)
        for (int64_t l = 0; l < width; ++l) out[(i + r) * ld + j + l] = c[r * kPanel + l] * factor;
    });
  }
}

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
