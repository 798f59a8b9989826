// The kernels from C++, without PyTorch: one forward pass against a plain loop.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/cpu.h"

int main() {
  using namespace loradash;
  const int64_t m = 37, k = 65, n = 50, r = 4, s = 3;
  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  const auto filled = [&](int64_t count) {
    std::vector<float> values(count);
    for (float& v : values) v = normal(engine);
    return values;
  };
  const auto x = filled(m * k), w = filled(n * k), a = filled(r * k), b = filled(n * r), u = filled(n * s),
             vt = filled(s * k), sigma = filled(s);
  const float scaling = 0.5f;
  const cpu::Dropout dropout{1, 2, 6554};
  const cpu::ThreadPool serial{1, [](int64_t count, void (*body)(void*, int64_t), void* context) {
                                 for (int64_t i = 0; i < count; ++i) body(context, i);
                               }};

  std::vector<char> packed(cpu::packed_bytes(DType::kFloat32, Pass::kForward, n, k));
  cpu::pack_weight(DType::kFloat32, Pass::kForward, w.data(), k, 1, n, k, packed.data(), serial);
  std::vector<float> y(m * n), p(m * (r + s));
  cpu::ForwardMember layer{};
  layer.n = n;
  layer.adapters = {a.data(), b.data(), u.data(), vt.data(), sigma.data(), r, s, scaling};
  layer.packed = packed.data();
  layer.y = y.data();
  cpu::ForwardParams params{};
  params.m = m;
  params.k = k;
  params.dropout = dropout;
  params.dtype = DType::kFloat32;
  params.x = x.data();
  params.ldx = k;
  params.members = &layer;
  params.count = 1;
  params.p = p.data();
  cpu::forward(params, serial);

  std::vector<uint8_t> keep(m * k);
  cpu::dropout_mask(dropout, m, k, keep.data());
  double worst = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t d = 0; d < k; ++d) sum += double(x[i * k + d]) * w[j * k + d];
      for (int64_t q = 0; q < r + s; ++q) {
        const float* row = q < r ? &a[q * k] : &vt[(q - r) * k];
        double projected = 0;
        for (int64_t d = 0; d < k; ++d) projected += keep[i * k + d] ? double(x[i * k + d]) * row[d] : 0;
        projected *= dropout.keep_scale();
        sum += q < r ? scaling * projected * b[j * r + q] : sigma[q - r] * projected * u[j * s + q - r];
      }
      worst = std::fmax(worst, std::fabs(sum - y[i * n + j]));
    }
  std::printf("%s: largest error %.2e\n", cpu::isa_name(DType::kFloat32), worst);
  return worst < 1e-3 ? 0 : 1;
}
