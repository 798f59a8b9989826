// AVX-512-BF16: products of bf16 pairs, fp32 sums (VDPBF16PS). The panels are those of AMX.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define LORADASH_ISA avx512_bf16
#define LORADASH_VECTOR_BYTES 64
#include "kernels_impl.h"

namespace loradash::cpu::avx512_bf16 {
namespace {

template <int kRows>
void multiply_pairs_rows(const Term<bf16>* terms, int count, float* c, bool accumulate) {
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[i][v] = accumulate ? _mm512_loadu_ps(c + i * kPanel + v * 16) : _mm512_setzero_ps();
  for (int t = 0; t < count; ++t) {
    const Term<bf16>& term = terms[t];
    for (int64_t d = 0; d < term.depth; d += 2) {
      const bf16* pairs = term.b + d * kPanel;
      __builtin_prefetch(term.next + d * term.next_step, 0, 2);
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(pairs), b1 = (__m512bh)_mm512_loadu_si512(pairs + kPanel);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        int pair;
        __builtin_memcpy(&pair, term.a + i * term.lda + d, 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, b0);
        sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + i * kPanel + v * 16, sum[i][v]);
}

template <int kRows = kTileRows>
void multiply_pairs(const Term<bf16>* terms, int count, int rows, float* c, bool accumulate) {
  if (rows == kRows) return multiply_pairs_rows<kRows>(terms, count, c, accumulate);
  if constexpr (kRows > 1) multiply_pairs<kRows - 1>(terms, count, rows, c, accumulate);
}

}  // namespace

template <typename T, typename E>
const Kernels<T, E>* table() {
  if constexpr (sizeof(E) == 2) {
    static constexpr Kernels<T, E> instance = make_table<T, E>("avx512_bf16", 8, kTileRows, true, multiply_pairs<>);
    return &instance;
  } else {
    return nullptr;
  }
}
#define LORADASH_TABLE(T, E) template const Kernels<T, E>* table<T, E>();
#include "kernels_types.inc"
}  // namespace loradash::cpu::avx512_bf16
#endif
