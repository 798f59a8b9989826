// The CUDA kernels from C++, without PyTorch: one forward pass against a plain loop, or, without a card, the launches
// it would take.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "cuda/plan/plan.h"

namespace {

// Rounds to bfloat16 and back, so that the plain loop starts from the same numbers.
float rounded(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}
uint16_t bits16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}

template <typename T>
T* on_card(const std::vector<T>& values) {
  T* data = nullptr;
  if (cudaMalloc(reinterpret_cast<void**>(&data), values.size() * sizeof(T)) != cudaSuccess) return nullptr;
  cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  return data;
}

}  // namespace

int main() {
  using namespace loradash;
  const int64_t m = 300, k = 136, n = 200, r = 8, s = 4;
  const float scaling = 0.5f;
  cuda::Problem problem{};
  problem.shape = {m, k, n};
  problem.dtype = DType::kBFloat16;
  problem.ldx = k;
  problem.weight = {nullptr, k, 1};
  problem.adapters = {{}, {}, {}, {}, nullptr, r, s, scaling};
  problem.card = {108, 163 * 1024};

  int cards = 0;
  if (cudaGetDeviceCount(&cards) != cudaSuccess || cards == 0) {
    alignas(16) static char weight[16];
    problem.weight.data = problem.x = weight;
    for (const cuda::KernelLaunch& l : cuda::plan_forward(problem, {}, nullptr).launches) {
      std::printf("no card; would launch %s: %u x %u x %u programs of %u threads\n", l.kernel.c_str(), l.grid[0],
                  l.grid[1], l.grid[2], l.threads);
    }
    return 0;
  }

  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  const auto filled = [&](int64_t count, float scale) {
    std::vector<float> values(count);
    for (float& v : values) v = rounded(scale * normal(engine));
    return values;
  };
  const auto halves = [](const std::vector<float>& values) {
    std::vector<uint16_t> out;
    for (float v : values) out.push_back(bits16(v));
    return out;
  };
  const float by_k = 1.0f / std::sqrt(static_cast<float>(k));
  const auto x = filled(m * k, 1), w = filled(n * k, by_k), a = filled(r * k, by_k), b = filled(n * r, 0.3f),
             u = filled(n * s, 1), vt = filled(s * k, by_k), sigma = filled(s, 1);
  cudaDeviceGetAttribute(&problem.card.processors, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&problem.card.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const auto matrix = [](const std::vector<float>& values) {
    return cuda::TypedMatrix{on_card(values), DType::kFloat32};
  };
  problem.x = on_card(halves(x)), problem.weight.data = on_card(halves(w));
  problem.adapters = {matrix(a), matrix(b), matrix(u), matrix(vt), on_card(sigma), r, s, scaling};
  cuda::ForwardOut out{};
  out.y = on_card(std::vector<uint16_t>(m * n)), out.p = on_card(std::vector<float>(m * (r + s)));
  void* workspace = on_card(std::vector<char>(cuda::plan_forward(problem, out, nullptr).workspace_bytes));
  const std::string failure = cuda::run(cuda::plan_forward(problem, out, workspace).launches, nullptr);
  if (!failure.empty() || cudaDeviceSynchronize() != cudaSuccess) {
    std::printf("failed: %s\n", failure.c_str());
    return 1;
  }

  std::vector<uint16_t> y(m * n);
  cudaMemcpy(y.data(), out.y, y.size() * 2, cudaMemcpyDeviceToHost);
  double worst = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t d = 0; d < k; ++d) sum += double(x[i * k + d]) * w[j * k + d];
      for (int64_t p = 0; p < r + s; ++p) {
        const float* row = p < r ? &a[p * k] : &vt[(p - r) * k];
        double projected = 0;
        for (int64_t d = 0; d < k; ++d) projected += double(x[i * k + d]) * row[d];
        sum += p < r ? scaling * projected * b[j * r + p] : sigma[p - r] * projected * u[j * s + p - r];
      }
      uint32_t bits = static_cast<uint32_t>(y[i * n + j]) << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      worst = std::fmax(worst, std::fabs(sum - value) / (1 + std::fabs(sum)));
    }
  std::printf("largest relative error %.2e\n", worst);
  return worst < 2e-2 ? 0 : 1;
}
