// Any CPU with a compiler that has vector extensions: 128-bit vectors, what x86-64 and AArch64 guarantee.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LORADASH_ISA portable
#define LORADASH_VECTOR_BYTES 16
#include "kernels_impl.h"

namespace loradash::cpu::portable {
template <typename T, typename E>
const Kernels<T, E>* table() {
  if constexpr (sizeof(E) == 4) {
    static constexpr Kernels<T, E> instance = make_table<T, E>("portable", 0, kTileRows, true, multiply_fp32<>);
    return &instance;
  } else {
    return nullptr;
  }
}
#define LORADASH_TABLE(T, E) template const Kernels<T, E>* table<T, E>();
#include "kernels_types.inc"
}  // namespace loradash::cpu::portable
