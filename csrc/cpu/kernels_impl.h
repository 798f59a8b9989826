// The primitives of kernels.h, written once on GCC vector extensions and compiled once per instruction set.
//
// A kernels_<isa>.cpp defines LORADASH_ISA (a namespace) and LORADASH_VECTOR_BYTES, switches the compiler's target,
// includes this file and returns its table. Everything here has internal linkage: a function compiled for AVX-512 must
// never be the copy that the linker keeps for other CPUs, which is also why no std:: template is called.
#include "dropout_impl.h"
#include "elements_impl.h"
#include "fingerprint_impl.h"
#include "kernels.h"
#include "staging_impl.h"
#include "vectors.h"

namespace loradash::cpu::LORADASH_ISA {
namespace {

constexpr int kTileVecs = 2;
// Rows of B are fetched so many ahead: panels stream from L2.
constexpr int kPrefetchDepth = 16;

// Sums of this many products are taken in registers and then added to c: the rounding error of one running sum over a
// depth of thousands would be several times that of a blocked library product.
constexpr int64_t kSumDepth = 384;

template <int kRows>
void multiply_rows(const Term<float>* terms, int count, float* c, bool accumulate) {
  for (int j = 0; j < kPanel; j += kTileVecs * kLanes) {
    bool add = accumulate;
    for (int t = 0; t < count; ++t) {
      const Term<float>& term = terms[t];
      const float *a = term.a, *row = term.b + j;
      const char* next = term.next;
      for (int64_t left = term.depth; left > 0 || !add; left -= kSumDepth) {
        VecF sum[kRows][kTileVecs] = {};
        for (int64_t d = smaller(left, kSumDepth); d > 0; --d, a += kRows, row += term.ldb, next += term.next_step) {
          const VecF b0 = *reinterpret_cast<const VecF*>(row), b1 = *reinterpret_cast<const VecF*>(row + kLanes);
          __builtin_prefetch(row + kPrefetchDepth * term.ldb);
          if (kLanes == 16) __builtin_prefetch(row + kPrefetchDepth * term.ldb + kLanes);
          __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < kTileVecs; ++v) {
            VecF* out = reinterpret_cast<VecF*>(c + i * kPanel + j + v * kLanes);
            *out = add ? *out + sum[i][v] : sum[i][v];
          }
        add = true;
      }
    }
  }
}

template <int kRows = kTileRows>
void multiply_fp32(const Term<float>* terms, int count, int rows, float* c, bool accumulate) {
  if (rows == kRows) return multiply_rows<kRows>(terms, count, c, accumulate);
  if constexpr (kRows > 1) multiply_fp32<kRows - 1>(terms, count, rows, c, accumulate);
}

void add_masked(const float* term, int rows, const uint32_t* bits, int64_t bits_stride, float* c) {
  for (int i = 0; i < rows; ++i, term += kPanel, c += kPanel) {
    float kept[kPanel];
    keep_32(term, bits[i * bits_stride], kept);
    for (int j = 0; j < kPanel; ++j) c[j] += kept[j];
  }
}

// dst = c, of 32 columns
template <typename T>
inline void store_32(const float* c, T* dst) {
  for (int j = 0; j < kPanel; ++j) dst[j] = round_to<T>(c[j]);
}
#if defined(__AVX512BF16__)
template <>
inline void store_32(const float* c, bf16* dst) {
  _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(c + 16), _mm512_loadu_ps(c)));
}
#endif

template <typename T>
void store_tile(const float* c, int rows, int columns, const float* bias, const T* base, T* dst, int64_t ld) {
  for (int i = 0; i < rows; ++i, c += kPanel, dst += ld) {
    if (columns == kPanel && !bias && !base) {
      store_32(c, dst);
      continue;
    }
    float row[kPanel] = {};
    for (int j = 0; j < columns; ++j) row[j] = c[j] + (bias ? bias[j] : 0.0f) + (base ? load(base[i * ld + j]) : 0.0f);
    if (columns == kPanel)
      store_32(row, dst);
    else
      for (int j = 0; j < columns; ++j) dst[j] = round_to<T>(row[j]);
  }
}

template <typename T>
void column_sums(const T* src, int64_t ld, int64_t rows, int columns, float* sums) {
  // So many rows are summed apart first: the rounding error grows with the groups, not with the rows.
  constexpr int64_t kGroup = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kGroup) {
    float group[kPanel] = {};
    for (int64_t i = i0; i < smaller(i0 + kGroup, rows); ++i)
      for (int j = 0; j < columns; ++j) group[j] += load(src[i * ld + j]);
    for (int j = 0; j < columns; ++j) sums[j] += group[j];
  }
}

[[maybe_unused]] void no_setup() {}

template <typename T, typename E>
constexpr Kernels<T, E> make_table(const char* name, int64_t min_base_rows, int tile_rows, bool even_tiles,
                                   void (*multiply)(const Term<E>*, int, int, float*, bool), void (*enter)() = no_setup,
                                   void (*leave)() = no_setup) {
  return {name,           min_base_rows, tile_rows,        even_tiles,        enter,
          leave,          multiply,      stage_tile<T, E>, stage_panel<T, E>, stage_transposed<T, E>,
          column_sums<T>, add_masked,    store_tile<T>,    scale_tile<E>,     transpose_tile<E>,
          pack_block<E>,  dropout_bits,  fingerprint_block};
}

}  // namespace
}  // namespace loradash::cpu::LORADASH_ISA
