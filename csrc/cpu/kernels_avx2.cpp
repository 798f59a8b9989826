// AVX2 and FMA. The base product stays in the library: 16 registers hold a 6x16 tile, which oneDNN's generated code
// beats.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define LORADASH_ISA avx2
#define LORADASH_VECTOR_BYTES 32
#include "kernels_impl.h"

namespace loradash::cpu::avx2 {
template <typename T, typename E>
const Kernels<T, E>* table() {
  if constexpr (sizeof(E) == 4) {
    static constexpr Kernels<T, E> instance = make_table<T, E>("avx2", 0, kTileRows, true, multiply_fp32<>);
    return &instance;
  } else {
    return nullptr;
  }
}
#define LORADASH_TABLE(T, E) template const Kernels<T, E>* table<T, E>();
#include "kernels_types.inc"
}  // namespace loradash::cpu::avx2
#endif
