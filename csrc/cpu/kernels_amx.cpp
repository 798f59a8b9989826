// AMX: bf16 tiles of 16x32, four fp32 accumulator tiles, 1,024 multiply-adds a cycle on paper.
#if defined(__x86_64__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define LORADASH_ISA amx
#define LORADASH_VECTOR_BYTES 64
#include "kernels_impl.h"

namespace loradash::cpu::amx {
namespace {

// Rows of a tile; its columns are 64 bytes.
constexpr int kTile = 16;
// Depth staged at a time for a tile with missing rows: 32 KB.
constexpr int64_t kTailDepth = 512;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};

void configure_tiles() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}
void release_tiles() { _tile_release(); }

// C tiles 0 1 / 2 3, A tiles 4 / 5, B tiles 6 7: each loaded tile enters two products.
template <bool kTwoRows>
inline void multiply_full(const Term<bf16>* terms, int count, float* c, bool accumulate) {
  constexpr int kStride = kPanel * 4;
  float* c2 = c + kTile * kPanel;
  if (accumulate) {
    _tile_loadd(0, c, kStride);
    _tile_loadd(1, c + 16, kStride);
    if (kTwoRows) {
      _tile_loadd(2, c2, kStride);
      _tile_loadd(3, c2 + 16, kStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwoRows) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int t = 0; t < count; ++t) {
    const Term<bf16>& term = terms[t];
    const bf16 *a = term.a, *a2 = a + kTile * term.lda, *b = term.b;
    const int64_t lda = term.lda;
    for (int64_t d = 0; d < term.depth; d += 32) {
      _tile_loadd(6, b + d * kPanel, 2 * kPanel * 2);
      _tile_loadd(4, a + d, lda * 2);
      _tile_dpbf16ps(0, 4, 6);
      for (int64_t line = 0; line < 32 * term.next_step; line += 64)
        __builtin_prefetch(term.next + d * term.next_step + line, 0, 2);
      _tile_loadd(7, b + d * kPanel + kPanel, 2 * kPanel * 2);
      _tile_dpbf16ps(1, 4, 7);
      if (kTwoRows) {
        _tile_loadd(5, a2 + d, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, kStride);
  _tile_stored(1, c + 16, kStride);
  if (kTwoRows) {
    _tile_stored(2, c2, kStride);
    _tile_stored(3, c2 + 16, kStride);
  }
}

// A tile with missing rows: those of A would be read and those of C written beyond their ends, so both are staged.
void multiply_tail(const Term<bf16>* terms, int count, int rows, float* c, bool accumulate) {
  alignas(64) static thread_local bf16 tail_a[2 * kTile * kTailDepth];
  alignas(64) static thread_local float tail_c[2 * kTile * kPanel];
  __builtin_memset(tail_c, 0, sizeof(tail_c));
  if (accumulate) __builtin_memcpy(tail_c, c, sizeof(float) * rows * kPanel);
  for (int t = 0; t < count; ++t) {
    const Term<bf16>& term = terms[t];
    const int64_t step = smaller(term.depth, kTailDepth);
    __builtin_memset(tail_a, 0, sizeof(bf16) * 2 * kTile * step);
    for (int64_t d = 0; d < term.depth; d += step) {
      const int64_t width = smaller(step, term.depth - d);
      for (int i = 0; i < rows; ++i)
        __builtin_memcpy(tail_a + i * step, term.a + i * term.lda + d, sizeof(bf16) * width);
      const Term<bf16> part{tail_a, step, term.b + d * kPanel, kPanel, width, nullptr, 0};
      if (rows > kTile)
        multiply_full<true>(&part, 1, tail_c, true);
      else
        multiply_full<false>(&part, 1, tail_c, true);
    }
  }
  __builtin_memcpy(c, tail_c, sizeof(float) * rows * kPanel);
}

void multiply_tiles(const Term<bf16>* terms, int count, int rows, float* c, bool accumulate) {
  if (rows == 2 * kTile) return multiply_full<true>(terms, count, c, accumulate);
  if (rows == kTile) return multiply_full<false>(terms, count, c, accumulate);
  multiply_tail(terms, count, rows, c, accumulate);
}

}  // namespace

template <typename T, typename E>
const Kernels<T, E>* table() {
  if constexpr (sizeof(E) == 2) {
    static constexpr Kernels<T, E> instance =
        make_table<T, E>("amx", 64, 2 * kTile, false, multiply_tiles, configure_tiles, release_tiles);
    return &instance;
  } else {
    return nullptr;
  }
}
#define LORADASH_TABLE(T, E) template const Kernels<T, E>* table<T, E>();
#include "kernels_types.inc"
}  // namespace loradash::cpu::amx
#endif
