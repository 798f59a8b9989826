// Philox4x32-10 as far as the elements of a column or of a row share its rounds; problem.h gives counter, key and
// constants.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace loradash::cpu {

struct PhiloxKeys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];

  explicit PhiloxKeys(uint64_t seed) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kPhiloxRounds; ++i, a += kPhiloxW0, b += kPhiloxW1) k0[i] = a, k1[i] = b;
  }
};

// The first two of the ten rounds cost nothing per element, and the third costs half, because their inputs depend on k
// alone or on m alone: with the counter words in this order, round 1 multiplies k and a constant, and round 2 what came
// from m and what came from k separately. A PhiloxColumn is computed once per k block, a PhiloxRow once per m.
//
// A column holds the words after round 2 that depend on k alone, and the halves of round 3's first product.
struct PhiloxColumn {
  // These are c1, and the part of c2 that depends on k.
  uint32_t word1, word2_k;
  // These are the high and the low half of M0 c0 in round 3; next2_k already has its key.
  uint32_t next2_k, next3;
};

static inline uint64_t philox_product(uint32_t m, uint32_t c) { return static_cast<uint64_t>(m) * c; }

static inline PhiloxColumn philox_column(uint32_t block, const Dropout& dropout, const PhiloxKeys& keys) {
  const uint32_t c2 = static_cast<uint32_t>(dropout.offset), c3 = static_cast<uint32_t>(dropout.offset >> 32);
  const uint64_t first = philox_product(kPhiloxM0, block), fixed = philox_product(kPhiloxM1, c2);
  const uint32_t r1_c1 = static_cast<uint32_t>(fixed);
  const uint32_t r1_c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ keys.k1[0];
  const uint32_t r1_c3 = static_cast<uint32_t>(first);
  const uint64_t second = philox_product(kPhiloxM1, r1_c2);
  const uint32_t r2_c0 = static_cast<uint32_t>(second >> 32) ^ r1_c1 ^ keys.k0[1];
  const uint64_t third = philox_product(kPhiloxM0, r2_c0);
  return {static_cast<uint32_t>(second), r1_c3 ^ keys.k1[1], static_cast<uint32_t>(third >> 32) ^ keys.k1[2],
          static_cast<uint32_t>(third)};
}

// A row holds the words after round 2 that depend on m alone: its part of c2, and c3.
struct PhiloxRow {
  uint32_t word2_m, word3;
};

static inline PhiloxRow philox_row(uint32_t m, const Dropout& dropout, const PhiloxKeys& keys) {
  const uint64_t fixed = philox_product(kPhiloxM1, static_cast<uint32_t>(dropout.offset));
  const uint32_t r1_c0 = static_cast<uint32_t>(fixed >> 32) ^ m ^ keys.k0[0];
  const uint64_t second = philox_product(kPhiloxM0, r1_c0);
  return {static_cast<uint32_t>(second >> 32), static_cast<uint32_t>(second)};
}

}  // namespace loradash::cpu
