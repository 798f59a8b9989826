// Packing of the frozen weight, which instruction set serves which dtype, and the dropout mask as a byte matrix.
#include <vector>

#include "blocking.h"

namespace loradash::cpu {
namespace {

// Calls body(T{}, E{}) with the types of memory and operands that serve this dtype.
template <typename F>
auto with_types(DType dtype, const F& body) {
  if (dtype == DType::kFloat32) return body(float{}, float{});
  if (dtype == DType::kFloat16) return body(fp16{}, float{});
  return kernels<bf16, bf16>() ? body(bf16{}, bf16{}) : body(bf16{}, float{});
}

// Depth and columns of B in the product of each pass: x W^T and dy W.
struct Extent {
  int64_t depth, columns, stride_depth, stride_column;
};

Extent extent(Pass pass, int64_t n, int64_t k, int64_t stride_n = 0, int64_t stride_k = 0) {
  if (pass == Pass::kForward) return {k, n, stride_k, stride_n};
  return {n, k, stride_n, stride_k};
}

}  // namespace

int64_t min_base_rows(DType dtype) {
  return with_types(dtype, [](auto t, auto e) { return kernels<decltype(t), decltype(e)>()->min_base_rows; });
}

const char* isa_name(DType dtype) {
  return with_types(dtype, [](auto t, auto e) { return kernels<decltype(t), decltype(e)>()->name; });
}

int64_t packed_bytes(DType dtype, Pass pass, int64_t n, int64_t k) {
  const Extent b = extent(pass, n, k);
  return with_types(dtype, [&](auto, auto e) -> int64_t {
    return padded_depth<decltype(e)>(b.depth) * ceil_div(b.columns, kPanel) * kPanel * sizeof(e);
  });
}

void pack_weight(DType dtype, Pass pass, const void* w, int64_t stride_n, int64_t stride_k, int64_t n, int64_t k,
                 void* packed, const ThreadPool& pool) {
  const Extent b = extent(pass, n, k, stride_n, stride_k);
  with_types(dtype, [&](auto t, auto e) {
    using T = decltype(t);
    using E = decltype(e);
    const Kernels<T, E>& table = *kernels<T, E>();
    const int64_t panel_size = padded_depth<E>(b.depth) * kPanel;
    parallel(pool, table, ceil_div(b.columns, kPanel), [&](int64_t panel) {
      const T* src = static_cast<const T*>(w) + panel * kPanel * b.stride_column;
      E* dst = static_cast<E*>(packed) + panel * panel_size;
      const int columns = static_cast<int>(std::min<int64_t>(kPanel, b.columns - panel * kPanel));
      if (b.stride_column == 1)
        table.stage_panel(src, b.stride_depth, b.depth, columns, nullptr, 0, dst);
      else
        table.stage_transposed(src, b.stride_column, b.depth, columns, dst);
    });
  });
}

void dropout_mask(const Dropout& dropout, int64_t m, int64_t k, uint8_t* keep) {
  const int64_t words = ceil_div(k, 32);
  std::vector<uint32_t> bits(words);
  for (int64_t i = 0; i < m; ++i) {
    kernels<float, float>()->dropout_bits(dropout, i, 1, 0, k, bits.data(), words);
    for (int64_t j = 0; j < k; ++j) keep[i * k + j] = bits[j / 32] >> (j % 32) & 1;
  }
}

}  // namespace loradash::cpu
