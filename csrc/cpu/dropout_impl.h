// Keep bits of dropout: Philox on vectors, compiled once per instruction set (see kernels_impl.h).
//
// Per 64 elements: 15 multiplications and 30 other vector operations; nothing is read but 32 bytes a block of 8
// columns.
#pragma once

#include "kernels.h"
#include "philox.h"
#include "vectors.h"

namespace loradash::cpu::LORADASH_ISA {
namespace {

// Every lane holds the keys of all rounds.
struct KeyVectors {
  VecU k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit KeyVectors(const PhiloxKeys& keys) {
    for (int i = 0; i < kPhiloxRounds; ++i) k0[i] = VecU{} + keys.k0[i], k1[i] = VecU{} + keys.k1[i];
  }
};

// Runs rounds 3 to 10 for kVectorBytes / 8 blocks at once, each in a 64-bit lane; upper halves of c hold what the
// multiplications ignore. A round takes 6 vector operations.
inline void philox_rounds(const VecU column[4], PhiloxRow row, const KeyVectors& keys, VecU c[4]) {
  const VecU m0 = VecU{} + kPhiloxM0, m1 = VecU{} + kPhiloxM1;
  // Round 3 has its first product from the column; this is its second.
  const VecU product = multiply_low32(m1, (column[1] ^ row.word2_m));
  c[0] = xor3(high_word(product), column[0], keys.k0[2]);
  c[1] = product;
  c[2] = column[2] ^ row.word3;
  c[3] = column[3];
#pragma GCC unroll 8
  for (int i = 3; i < kPhiloxRounds; ++i) {
    const VecU p0 = multiply_low32(m0, c[0]), p1 = multiply_low32(m1, c[2]);
    c[0] = xor3(high_word(p1), c[1], keys.k0[i]);
    c[1] = p1;
    c[2] = xor3(high_word(p0), c[3], keys.k1[i]);
    c[3] = p0;
  }
}

// Returns the keep bits of the 8 half-words of each block, in order of k, from one vector per word: 8 bits a block.
inline uint64_t keep_bits(const VecU c[4], uint32_t threshold) {
#if LORADASH_VECTOR_BYTES == 64
  // Every 64-bit lane gets the low 32 bits of even, then those of odd.
  const auto pairs = [](VecU even, VecU odd) {
    return _mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, static_cast<_MM_PERM_ENUM>(0xa0));
  };
  const __m512i low = pairs(c[0], c[1]), high = pairs(c[2], c[3]);
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
  const uint64_t keep = _mm512_cmpge_epu16_mask(_mm512_permutex2var_epi64(low, first, high), limit);
  const uint64_t rest = _mm512_cmpge_epu16_mask(_mm512_permutex2var_epi64(low, second, high), limit);
  return keep | rest << 32;
#else
  uint64_t keep = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i)
    for (int h = 0; h < 8; ++h)
      keep |= static_cast<uint64_t>((c[h / 2][i] >> 16 * (h % 2) & 0xffff) >= threshold) << (8 * i + h);
  return keep;
#endif
}

// The first rounds of so many Philox blocks are kept for all rows: 8 KB.
constexpr int64_t kColumnBlocks = 256;

void dropout_bits(const Dropout& dropout, int64_t row, int64_t rows, int64_t k_begin, int64_t k_end, uint32_t* bits,
                  int64_t bits_stride) {
  constexpr int kBlocksPerVector = kVectorBytes / 8;
  const PhiloxKeys keys(dropout.seed);
  const KeyVectors key_vectors(keys);
  alignas(64) uint64_t column[4][kColumnBlocks];
  const int64_t last = ceil_div(k_end, kPhiloxElements);
  for (int64_t b0 = k_begin / kPhiloxElements; b0 < last; b0 += kColumnBlocks) {
    const int64_t count = smaller(last - b0, kColumnBlocks);
    for (int64_t b = 0; b < ceil_div(count, 8) * 8; ++b) {
      const PhiloxColumn words = philox_column(dropout.first_block + static_cast<uint32_t>(b0 + b), dropout, keys);
      column[0][b] = words.word1, column[1][b] = words.word2_k;
      column[2][b] = words.next2_k, column[3][b] = words.next3;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const PhiloxRow shared = philox_row(dropout.first_row + static_cast<uint32_t>(row + i), dropout, keys);
      uint32_t* out = bits + i * bits_stride + (b0 * kPhiloxElements - k_begin) / 32;
      // Each step draws the bits of 64 elements.
      for (int64_t b = 0; b < count; b += 8, out += 2) {
        uint64_t keep = 0;
        for (int part = 0; part < 8; part += kBlocksPerVector) {
          VecU fixed[4], c[4];
          for (int j = 0; j < 4; ++j) fixed[j] = *reinterpret_cast<const VecU*>(&column[j][b + part]);
          philox_rounds(fixed, shared, key_vectors, c);
          keep |= keep_bits(c, dropout.threshold) << 8 * part;
        }
        out[0] = static_cast<uint32_t>(keep);
        if ((b0 + b) * kPhiloxElements + 32 < k_end) out[1] = static_cast<uint32_t>(keep >> 32);
      }
    }
  }
}

}  // namespace
}  // namespace loradash::cpu::LORADASH_ISA
