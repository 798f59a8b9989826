// Which instruction set runs: the highest that the CPU and the operating system allow, or LORADASH_CPU_ISA if lower.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace loradash::cpu {
namespace {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

#if defined(__x86_64__)
// Linux grants the 8 KB of tile registers on request only.
bool amx_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// CPUID leaf 7, EDX: bits 22 (AMX-BF16) and 24 (AMX-TILE), which older compilers' __builtin_cpu_supports do not know.
bool cpu_has_amx() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 22 & 1) && (d >> 24 & 1);
}

Isa best_isa() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return cpu_has_amx() && amx_granted() ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa best_isa() { return Isa::kPortable; }
#endif

Isa wanted_isa() {
  const char* wanted = std::getenv("LORADASH_CPU_ISA");
  if (!wanted) return Isa::kAmx;
  const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(wanted, names[i]) == 0) return static_cast<Isa>(i);
  throw std::invalid_argument(std::string("LORADASH_CPU_ISA is '") + wanted +
                              "'; expected portable, avx2, avx512, avx512_bf16 or amx");
}

Isa current_isa() {
  static const Isa isa = std::min(best_isa(), wanted_isa());
  return isa;
}

}  // namespace

template <typename T, typename E>
const Kernels<T, E>* kernels() {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (sizeof(E) == 2)
    return isa == Isa::kAmx ? amx::table<T, E>() : isa == Isa::kAvx512Bf16 ? avx512_bf16::table<T, E>() : nullptr;
  if (isa >= Isa::kAvx512) return avx512::table<T, E>();
  if (isa >= Isa::kAvx2) return avx2::table<T, E>();
#endif
  return portable::table<T, E>();
}
#define LORADASH_TABLE(T, E) template const Kernels<T, E>* kernels<T, E>();
#include "kernels_types.inc"

}  // namespace loradash::cpu
