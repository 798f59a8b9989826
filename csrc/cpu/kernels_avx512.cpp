// AVX-512 with fp32 products: 14x32 tiles of C in registers. The fp32 base product runs here too, fused.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define LORADASH_ISA avx512
#define LORADASH_VECTOR_BYTES 64
#include "kernels_impl.h"

namespace loradash::cpu::avx512 {
template <typename T, typename E>
const Kernels<T, E>* table() {
  if constexpr (sizeof(E) == 4) {
    static constexpr Kernels<T, E> instance =
        make_table<T, E>("avx512", sizeof(T) == sizeof(E) ? 8 : 0, kTileRows, true, multiply_fp32<>);
    return &instance;
  } else {
    return nullptr;
  }
}
#define LORADASH_TABLE(T, E) template const Kernels<T, E>* table<T, E>();
#include "kernels_types.inc"
}  // namespace loradash::cpu::avx512
#endif
