// Dropout: the keep bits of eight neighbours in k, by one call of Philox4x32-10 (Salmon et al., SC 2011). The same bits
// as on the CPU: counter (k / 8, m, offset), key seed, half-word k % 8 against a 16-bit threshold.
#pragma once

#include <cstdint>

namespace loradash::gpu {

struct DropoutKey {
  uint32_t key0, key1, offset0, offset1, threshold;  // threshold 0: no dropout

  __device__ DropoutKey(const int64_t* seed, uint32_t threshold_in) : threshold(seed ? threshold_in : 0) {
    const uint64_t key = threshold ? static_cast<uint64_t>(seed[0]) : 0;
    const uint64_t offset = threshold ? static_cast<uint64_t>(seed[1]) : 0;
    key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    offset0 = static_cast<uint32_t>(offset), offset1 = static_cast<uint32_t>(offset >> 32);
  }
  __device__ bool active() const { return threshold != 0; }
};

// Bit i is set where element (m, 8 * block + i) is kept.
__device__ __forceinline__ uint32_t keep_bits(const DropoutKey& d, uint32_t m, uint32_t block) {
  uint32_t c0 = block, c1 = m, c2 = d.offset0, c3 = d.offset1, k0 = d.key0, k1 = d.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * c0, second = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((words[i] & 0xFFFF) >= d.threshold) << (2 * i);
    bits |= static_cast<uint32_t>((words[i] >> 16) >= d.threshold) << (2 * i + 1);
  }
  return bits;
}

// Zeroes the dropped ones of eight 16-bit elements.
__device__ __forceinline__ uint4 masked(uint4 chunk, uint32_t bits) {
  uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] &= ((bits >> (2 * i)) & 1 ? 0x0000FFFFu : 0u) | ((bits >> (2 * i + 1)) & 1 ? 0xFFFF0000u : 0u);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace loradash::gpu
