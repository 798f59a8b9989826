// Operands of the product, staged from memory (T) or from fp32 into the layouts that it reads (E), compiled once per
// instruction set (see kernels_impl.h).
#pragma once

#include "elements_impl.h"
#include "kernels.h"
#include "vectors.h"

namespace loradash::cpu::LORADASH_ISA {
namespace {

// Rows of a tile of C, two vectors a row: 14 rows of AVX-512 leave 2 registers for B and 1 for A; 6 rows of 16
// registers likewise.
constexpr int kTileRows = kVectorBytes == 64 ? 14 : 6;

template <typename E, typename T>
inline E kept(T x, uint32_t word, int lane) {
  return (word >> lane & 1) ? convert<E>(x) : E{};
}

// Sets dst[j] to src[j] where bit j of word is set, else to 0, j < 32.
template <typename T, typename E>
inline void keep_32(const T* src, uint32_t word, E* dst) {
  for (int j = 0; j < kPanel; ++j) dst[j] = kept<E>(src[j], word, j);
}
// Writes one pair row of a bf16 panel: dst[2 j + h] is element j of row h where bit j of word h is set, else 0.
template <typename T, typename E>
inline void keep_pairs(const T* const row[2], const uint32_t word[2], E* dst) {
  for (int j = 0; j < kPanel; ++j)
    for (int h = 0; h < 2; ++h) dst[2 * j + h] = kept<E>(row[h][j], word[h], j);
}
#if LORADASH_VECTOR_BYTES == 64
template <>
inline void keep_32(const float* src, uint32_t word, float* dst) {
  _mm512_storeu_ps(dst, _mm512_maskz_loadu_ps(static_cast<__mmask16>(word), src));
  _mm512_storeu_ps(dst + 16, _mm512_maskz_loadu_ps(static_cast<__mmask16>(word >> 16), src + 16));
}
template <>
inline void keep_32(const bf16* src, uint32_t word, bf16* dst) {
  _mm512_storeu_si512(dst, _mm512_maskz_loadu_epi16(word, src));
}
template <>
inline void keep_pairs(const bf16* const row[2], const uint32_t word[2], bf16* dst) {
  const __m512i even = _mm512_maskz_loadu_epi16(word[0], row[0]), odd = _mm512_maskz_loadu_epi16(word[1], row[1]);
  // Low and high 16-bit words of (even, odd) are unpacked per 128 bits; then the 32-bit lanes of pairs are put in
  // order.
  const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi64(low, first, high));
  _mm512_storeu_si512(dst + kPanel, _mm512_permutex2var_epi64(low, second, high));
}
#endif

// Returns the position of (row i, depth d) in a tile of a left operand.
template <typename E>
inline int64_t tile_offset(int rows, int64_t pitch, int64_t i, int64_t d) {
  return sizeof(E) == 2 ? i * pitch + d : d * rows + i;
}

// Transposes 32 columns of an fp32 tile: dst[j * rows + i] is element j of row i where word i keeps it, else 0.
template <typename T>
inline void transpose_32(const T* src, int64_t ld, int rows, const uint32_t* bits, int64_t bits_stride, float* dst) {
  float block[kTileRows][kPanel];
  for (int i = 0; i < rows; ++i) keep_32(src + i * ld, bits ? bits[i * bits_stride] : ~0u, block[i]);
  for (int j = 0; j < kPanel; ++j)
    for (int i = 0; i < rows; ++i) dst[j * rows + i] = block[i][j];
}
#if LORADASH_VECTOR_BYTES == 64
// Transposes 16x16 words: within 128-bit lanes by pairs and quadruples of rows, then whole lanes.
inline void transpose_words(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm512_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      r[i + 2 * h + 1] = _mm512_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x44), b = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xee);
    const __m512 d = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x44),
                 e = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xee);
    t[c] = _mm512_shuffle_f32x4(a, d, 0x88), t[c + 4] = _mm512_shuffle_f32x4(a, d, 0xdd);
    t[c + 8] = _mm512_shuffle_f32x4(b, e, 0x88), t[c + 12] = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

template <>
inline void transpose_32(const float* src, int64_t ld, int rows, const uint32_t* bits, int64_t bits_stride,
                         float* dst) {
  const __mmask16 lanes = static_cast<__mmask16>((1u << rows) - 1);
  for (int half = 0; half < 2; ++half) {
    __m512 r[16];
    for (int i = 0; i < 16; ++i) {
      const uint32_t word = i >= rows ? 0 : bits ? bits[i * bits_stride] : ~0u;
      r[i] =
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(word >> 16 * half), src + (i < rows ? i : 0) * ld + 16 * half);
    }
    transpose_words(r);
    for (int j = 0; j < 16; ++j) _mm512_mask_storeu_ps(dst + (16 * half + j) * rows, lanes, r[j]);
  }
}
#endif

template <typename T, typename E>
void stage_tile(const T* src, int64_t ld, int rows, int64_t k, const uint32_t* bits, int64_t bits_stride, E* dst) {
  const int64_t padded = padded_depth<E>(k), pitch = tile_pitch<E>(k), full = k / kPanel * kPanel;
  if constexpr (sizeof(E) == 4) {
    for (int64_t j = 0; j < full; j += kPanel)
      transpose_32(src + j, ld, rows, bits ? bits + j / kPanel : nullptr, bits_stride, dst + j * rows);
  } else {
    for (int i = 0; i < rows; ++i)
      for (int64_t j = 0; j < full; j += kPanel)
        keep_32(src + i * ld + j, bits ? bits[i * bits_stride + j / kPanel] : ~0u, dst + i * pitch + j);
  }
  for (int i = 0; i < rows; ++i) {
    const uint32_t word = bits && full < k ? bits[i * bits_stride + full / kPanel] : ~0u;
    for (int64_t j = full; j < padded; ++j)
      dst[tile_offset<E>(rows, pitch, i, j)] = j < k ? kept<E>(src[i * ld + j], word, static_cast<int>(j - full)) : E{};
  }
}

// Panels are cut from blocks of so many rows. The hardware fetches ahead inside a row, never across rows that lie far
// apart, so each step fetches the same columns so many rows on.
constexpr int64_t kFetchRows = 64;

// Where a pair lacks its second row, this row of zeros takes its place.
template <typename T>
const T kZeroRow[kPanel] = {};

template <typename T, typename E>
void stage_panel(const T* src, int64_t ld, int64_t rows, int columns, const uint32_t* bits, int64_t bits_stride,
                 E* dst) {
  constexpr int kPair = sizeof(E) == 2 ? 2 : 1;
  const int64_t padded = padded_depth<E>(rows);
  // Rows of a panel that is not full are copied here.
  T partial[kPair][kPanel] = {};
  for (int64_t d = 0; d < padded; d += kPair, dst += kPair * kPanel) {
    const T* row[kPair];
    uint32_t word[kPair];
    for (int h = 0; h < kPair; ++h) {
      const bool inside = d + h < rows;
      for (int line = 0; line < kPanel * static_cast<int>(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(src + (d + h + kFetchRows) * ld) + line, 0, 2);
      row[h] = inside ? src + (d + h) * ld : kZeroRow<T>;
      word[h] = inside && bits ? bits[(d + h) * bits_stride] : ~0u;
      if (columns < kPanel && inside) {
        for (int j = 0; j < columns; ++j) partial[h][j] = row[h][j];
        row[h] = partial[h];
      }
    }
    if constexpr (kPair == 2)
      keep_pairs(row, word, dst);
    else
      keep_32(row[0], word[0], dst);
  }
}

#if LORADASH_VECTOR_BYTES == 64
// Loads the first `count` elements of a line; the rest are zero.
inline __m512 load_line(const float* src, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1), src);
}
inline __m512 load_line(const bf16* src, int64_t count) {
  return (__m512)_mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, src);
}

// Where elements are stored as they are, a panel is a transposition of 32-bit words: of numbers, or of pairs of bf16.
template <typename E>
void stage_transposed_words(const E* src, int64_t ld, int64_t depth, int columns, E* dst) {
  constexpr int64_t kLineElements = 64 / sizeof(E);
  // Columns lie apart, and the hardware does not follow 32 of them: each is fetched eight lines ahead.
  constexpr int64_t kFetch = 8 * kLineElements;
  for (int64_t d = 0; d < depth; d += kLineElements, dst += kLineElements * kPanel) {
    const int64_t steps = smaller(16, (padded_depth<E>(depth) - d) * static_cast<int64_t>(sizeof(E)) / 4);
    for (int half = 0; half < 2; ++half) {
      __m512 r[16];
      for (int i = 0; i < 16; ++i) {
        const int column = 16 * half + i;
        __builtin_prefetch(src + column * ld + d + kFetch);
        r[i] = column < columns ? load_line(src + column * ld + d, depth - d) : _mm512_setzero_ps();
      }
      transpose_words(r);
      for (int64_t j = 0; j < steps; ++j)
        _mm512_storeu_ps(reinterpret_cast<float*>(dst) + j * kPanel + 16 * half, r[j]);
    }
  }
}
#endif

template <typename T, typename E>
void stage_transposed(const T* src, int64_t ld, int64_t depth, int columns, E* dst) {
#if LORADASH_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == sizeof(E)) return stage_transposed_words(src, ld, depth, columns, dst);
#endif
  constexpr int kPair = sizeof(E) == 2 ? 2 : 1;
  // A block of this depth is read and written at a time: both then stay in L1.
  constexpr int kBlock = 32;
  const int64_t padded = padded_depth<E>(depth);
  for (int64_t d0 = 0; d0 < padded; d0 += kBlock) {
    const int64_t d1 = smaller(d0 + kBlock, padded);
    for (int j = 0; j < kPanel; ++j) {
      const T* column = src + j * ld;
      for (int64_t d = d0; d < d1; d += kPair)
        for (int h = 0; h < kPair; ++h)
          dst[d * kPanel + j * kPair + h] = j < columns && d + h < depth ? convert<E>(column[d + h]) : E{};
    }
  }
}

template <typename E>
void scale_tile(const float* src, int64_t ld, int rows, int64_t columns, const float* factor, E* dst) {
  const int64_t padded = padded_depth<E>(columns), pitch = tile_pitch<E>(columns);
  for (int i = 0; i < rows; ++i)
    for (int64_t j = 0; j < padded; ++j)
      dst[tile_offset<E>(rows, pitch, i, j)] = j < columns ? round_to<E>(src[i * ld + j] * factor[j]) : E{};
}

template <typename E>
void transpose_tile(const float* src, int64_t ld, int64_t rows, int columns, int64_t pitch, E* dst) {
  const int64_t padded = padded_depth<E>(rows);
  for (int64_t d = 0; d < padded; ++d)
    for (int i = 0; i < columns; ++i)
      dst[tile_offset<E>(columns, pitch, i, d)] = d < rows ? round_to<E>(src[d * ld + i]) : E{};
}

template <typename E>
void pack_block(const float* src, int64_t stride_d, int64_t stride_c, int64_t depth, int64_t columns,
                int64_t depth_padded, int64_t d0, int64_t c0, E* dst) {
  constexpr int64_t kPair = sizeof(E) == 2 ? 2 : 1;
  for (int64_t j0 = 0; j0 < columns;) {
    // Each round ends where the panel does.
    const int64_t j1 = smaller(columns, ((c0 + j0) / kPanel + 1) * kPanel - c0);
    for (int64_t d = 0; d < depth; ++d) {
      E* out = dst + packed_offset<E>(depth_padded, d0 + d, c0 + j0);
      const float* in = src + d * stride_d + j0 * stride_c;
      for (int64_t j = 0; j < j1 - j0; ++j) out[j * kPair] = round_to<E>(in[j * stride_c]);
    }
    j0 = j1;
  }
}

}  // namespace
}  // namespace loradash::cpu::LORADASH_ISA
