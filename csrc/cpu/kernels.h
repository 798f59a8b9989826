// The table of primitives that one instruction set provides to the drivers in forward.cpp and backward.cpp.
//
// Every product of the layer is the same small matrix product C += A B: A row-major, B packed into panels of
// kPanel columns, C a tile of fp32 in cache. What differs between instruction sets is the operand type E (fp32, or
// bf16 where the CPU multiplies bf16 pairs) and the tile height. Elements of memory have type T.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace loradash::cpu {

// Columns of a packed panel.
constexpr int kPanel = 32;
// Rows of the highest tile.
constexpr int kMaxTile = 32;
// Bytes that are fingerprinted together, whatever the vectors.
constexpr int kFingerprintLine = 64;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Depth of a panel is padded to this multiple: AMX multiplies 32 bf16 at a time, fp32 goes one by one.
template <typename E>
constexpr int64_t kDepthStep = sizeof(E) == 2 ? 32 : 1;

// These have internal linkage, as all in kernels_impl.h: they are compiled for several instruction sets.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename E>
static inline int64_t padded_depth(int64_t depth) {
  return ceil_div(depth, kDepthStep<E>) * kDepthStep<E>;
}

// Distance of two rows of a staged left operand. bf16 tiles are read 16 rows at a time: one line more than the depth
// keeps rows of a power of two apart from falling into one set of L1.
template <typename E>
static inline int64_t tile_pitch(int64_t depth) {
  return padded_depth<E>(depth) + (sizeof(E) == 2 ? 32 : 0);
}

// Offset of B(d, column) in a packed matrix: fp32 panels are [depth][32], bf16 panels [depth / 2][32][2].
template <typename E>
static inline int64_t packed_offset(int64_t depth_padded, int64_t d, int64_t column) {
  const int64_t panel = column / kPanel * depth_padded * kPanel, lane = column % kPanel;
  return sizeof(E) == 2 ? panel + d / 2 * (2 * kPanel) + lane * 2 + d % 2 : panel + d * kPanel + lane;
}

// One factor pair of a product: a (rows, depth) times b (depth, kPanel). depth is a multiple of kDepthStep<E>.
// A tile of a is laid out as its kernel reads it: bf16 row by row, a[i * lda + d]; fp32 step by step, a[d * rows + i],
// so that the values broadcast in one step share a cache line (8 to 10% over row by row, measured).
template <typename E>
struct Term {
  const E* a;
  // Only bf16 tiles need it.
  int64_t lda;
  const E* b;
  // The distance of two steps of b, kPanel where b is packed; only fp32 products need it.
  int64_t ldb;
  int64_t depth;
  // What is multiplied after this panel, to be fetched into L2 meanwhile, so many bytes per unit of depth; or null.
  const char* next;
  int64_t next_step;
};

template <typename T, typename E>
struct Kernels {
  const char* name;
  // From so many rows on, the base product is at least as fast here as in the library; 0: never.
  int64_t min_base_rows;
  // Rows of a tile, at most kMaxTile.
  int tile_rows;
  // May a block of rows be cut into tiles of equal height, or are full tiles cheaper?
  bool even_tiles;

  // Called once per task, before and after any `multiply` (AMX configures and releases its tiles).
  void (*enter)();
  void (*leave)();

  // c (rows, kPanel) = (accumulate ? c : 0) + sum of the terms.
  void (*multiply)(const Term<E>* terms, int count, int rows, float* c, bool accumulate);

  // Stages a tile of a left operand, rows <= tile_rows: src (rows, k), with zeros where elements are dropped (`bits`)
  // and padded. bits: one word per 32 elements, bits_stride words a row. Rows of bf16 are tile_pitch<E>(k) apart.
  void (*stage_tile)(const T* src, int64_t ld, int rows, int64_t k, const uint32_t* bits, int64_t bits_stride, E* dst);
  // Packs one panel whose depth runs over the rows of src: B(d, j) = src[d * ld + j], j < columns <= kPanel.
  void (*stage_panel)(const T* src, int64_t ld, int64_t rows, int columns, const uint32_t* bits, int64_t bits_stride,
                      E* dst);
  // Packs one panel whose columns run over the rows of src: B(d, j) = src[j * ld + d].
  void (*stage_transposed)(const T* src, int64_t ld, int64_t depth, int columns, E* dst);
  // sums[j] += sum over rows of src[row * ld + j]
  void (*column_sums)(const T* src, int64_t ld, int64_t rows, int columns, float* sums);

  // c += bits ? term : 0, one word of bits a row.
  void (*add_masked)(const float* term, int rows, const uint32_t* bits, int64_t bits_stride, float* c);
  // dst = c + bias + base; bias and base may be null.
  void (*store_tile)(const float* c, int rows, int columns, const float* bias, const T* base, T* dst, int64_t ld);

  // The small operands come from fp32. This stages a tile of src (rows, columns) * factor, one factor a column.
  void (*scale_tile)(const float* src, int64_t ld, int rows, int64_t columns, const float* factor, E* dst);
  // Stages a tile of src^T: its rows are `columns` columns of src, its depth runs over the rows of src. Only bf16
  // needs the pitch.
  void (*transpose_tile)(const float* src, int64_t ld, int64_t rows, int columns, int64_t pitch, E* dst);
  // Packs B(d0 + d, c0 + j) = src[d * stride_d + j * stride_c] into a matrix that was zero.
  void (*pack_block)(const float* src, int64_t stride_d, int64_t stride_c, int64_t depth, int64_t columns,
                     int64_t depth_padded, int64_t d0, int64_t c0, E* dst);

  // Draws the keep bits of elements (row + i, k_begin + k), i < rows: bit k % 32 of bits[i * bits_stride + k / 32].
  // k_begin is a multiple of 32; bits beyond k_end in the last word are arbitrary.
  void (*dropout_bits)(const Dropout& dropout, int64_t row, int64_t rows, int64_t k_begin, int64_t k_end,
                       uint32_t* bits, int64_t bits_stride);

  // Takes the fingerprint of a block of memory; `keys` are random, as many bytes rounded up to lines, and one line
  // more.
  void (*fingerprint_block)(const char* block, int64_t bytes, const char* keys, uint64_t out[2]);
};

// Returns the best table this CPU runs, chosen once; LORADASH_CPU_ISA may ask for a lower one. Operands of type T in
// memory are multiplied as E; there is no table for bf16 operands on CPUs without bf16 products.
template <typename T, typename E>
const Kernels<T, E>* kernels();

// Each instruction set defines its own, in kernels_<isa>.cpp; null for (T, E) that the set does not serve.
#define LORADASH_DECLARE_ISA(isa)   \
  namespace isa {                   \
  template <typename T, typename E> \
  const Kernels<T, E>* table();     \
  }
LORADASH_DECLARE_ISA(portable)
LORADASH_DECLARE_ISA(avx2)
LORADASH_DECLARE_ISA(avx512)
LORADASH_DECLARE_ISA(avx512_bf16)
LORADASH_DECLARE_ISA(amx)
#undef LORADASH_DECLARE_ISA

}  // namespace loradash::cpu
