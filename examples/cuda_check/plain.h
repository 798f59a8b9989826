// The layer as plain loops in double precision, and how far kernels may be from them.
//
// Operands are 16-bit numbers, so that kernels and loops start alike. Kernels round T = P * c, T = G * c and P_r to 16
// bits before they multiply, and results once: the allowance of an element is two such roundings of the products that
// it is a sum of, one of the result, and what sums of fp32 lose.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cases.h"
#include "problem.h"

namespace check {

using Numbers = std::vector<float>;

inline uint16_t to_bits(DType dtype, float value) {
  if (dtype == DType::kBFloat16) return __nv_bfloat16_raw(__float2bfloat16(value)).x;
  return __half_raw(__float2half(value)).x;
}
inline float from_bits(DType dtype, uint16_t bits) {
  if (dtype == DType::kBFloat16) {
    __nv_bfloat16_raw raw;
    raw.x = bits;
    return __bfloat162float(raw);
  }
  __half_raw raw;
  raw.x = bits;
  return __half2float(raw);
}

// What a call reads, rounded to 16 bits. W is (N, K) by rows; base (M, N).
struct Inputs {
  Numbers x, w, bias, base, a, b, u, vt, sigma, dy;
  int64_t seed[2] = {20220317, 5};
  float scaling = 0.5f;

  explicit Inputs(const Case& c) {
    std::mt19937 engine(7);
    std::normal_distribution<float> normal;
    const auto [m, k, n] = c.shape;
    const auto fill = [&](Numbers& numbers, int64_t count, double scale) {
      numbers.resize(count);
      for (float& v : numbers) v = from_bits(c.dtype, to_bits(c.dtype, static_cast<float>(scale) * normal(engine)));
    };
    const double by_k = 1 / std::sqrt(static_cast<double>(k)), by_n = 1 / std::sqrt(static_cast<double>(n));
    fill(x, m * k, 1), fill(w, n * k, c.weight == Layout::kNone ? 0 : by_k), fill(bias, n, 1), fill(base, m * n, 1);
    fill(a, c.rank * k, by_k), fill(b, n * c.rank, 1), fill(u, n * c.directions, by_n);
    fill(vt, c.directions * k, by_k), fill(sigma, c.directions, 1), fill(dy, m * n, 1);
  }
};

// One result: what it should be, and how far from it a kernel may be.
struct Expected {
  std::string name;
  std::vector<double> values, allowed;

  Expected(const char* name_in, int64_t count) : name(name_in), values(count), allowed(count) {}
  // `low` counts the absolute products that were rounded to 16 bits, `high` those that were not.
  void set(int64_t index, double value, double low, double high, double unit) {
    values[index] = value;
    allowed[index] = unit * (std::fabs(value) + 2 * low) + 1e-5 * (low + high) + 1e-6;
  }
};

// Philox4x32-10, as csrc/problem.h describes it.
inline bool kept(const int64_t* seed, uint32_t threshold, int64_t m, int64_t k) {
  using namespace loradash;
  uint32_t c[4] = {static_cast<uint32_t>(k / kPhiloxElements), static_cast<uint32_t>(m), static_cast<uint32_t>(seed[1]),
                   static_cast<uint32_t>(seed[1] >> 32)};
  uint32_t key[2] = {static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(seed[0] >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = uint64_t{kPhiloxM0} * c[0], second = uint64_t{kPhiloxM1} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(first)};
    std::memcpy(c, next, sizeof(c));
    key[0] += kPhiloxW0, key[1] += kPhiloxW1;
  }
  const int half = static_cast<int>(k % kPhiloxElements);
  return (c[half / 2] >> (half % 2 * 16) & 0xFFFF) >= threshold;
}

// y, dx, dA, dB, the gradients of sigma and of the bias.
inline std::vector<Expected> plain(const Case& c, const Inputs& in) {
  const auto [m, k, n] = c.shape;
  const int64_t rank = c.rank, all = c.rank + c.directions;
  const double unit = c.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
  const double keep = loradash::keep_scale(c.threshold());
  const auto d = [&](int64_t p, int64_t i) { return p < rank ? in.a[p * k + i] : in.vt[(p - rank) * k + i]; };
  const auto q = [&](int64_t j, int64_t p) {
    return p < rank ? in.b[j * rank + p] : in.u[j * c.directions + p - rank];
  };
  const auto factor = [&](int64_t p) -> double { return p < rank ? in.scaling : in.sigma[p - rank]; };
  Expected y("y", m * n), dx("dx", m * k), da("dA", rank * k), db("dB", n * rank), dsigma("dsigma", c.directions),
      dbias("dbias", n);
  std::vector<double> dropped(m * k), p_sums(m * all), g_sums(m * all), g_sizes(m * all), p_sizes(m * all);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const bool stays = c.threshold() == 0 || kept(in.seed, c.threshold(), i, j);
      dropped[i * k + j] = stays ? keep * in.x[i * k + j] : 0;
    }
    for (int64_t p = 0; p < all; ++p) {
      double sum = 0, size = 0, g = 0, g_size = 0;
      for (int64_t j = 0; j < k; ++j)
        sum += dropped[i * k + j] * d(p, j), size += std::fabs(dropped[i * k + j] * d(p, j));
      for (int64_t j = 0; j < n; ++j)
        g += double(in.dy[i * n + j]) * q(j, p), g_size += std::fabs(double(in.dy[i * n + j]) * q(j, p));
      p_sums[i * all + p] = sum, g_sums[i * all + p] = g, p_sizes[i * all + p] = size, g_sizes[i * all + p] = g_size;
    }
    for (int64_t j = 0; j < n; ++j) {
      double sum = c.base ? in.base[i * n + j] : in.bias[j], high = std::fabs(sum), low = 0;
      for (int64_t e = 0; e < k; ++e) {
        const double product = double(in.x[i * k + e]) * in.w[j * k + e];
        sum += product, high += std::fabs(product);
      }
      for (int64_t p = 0; p < all; ++p) {
        const double product = p_sums[i * all + p] * factor(p) * q(j, p);
        sum += product, low += std::fabs(product), high += std::fabs(p_sizes[i * all + p] * factor(p) * q(j, p));
      }
      y.set(i * n + j, sum, low, high, unit);
    }
    std::vector<double> products(k), sizes(k);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t e = 0; e < k; ++e) {
        const double product = double(in.dy[i * n + j]) * in.w[j * k + e];
        products[e] += product, sizes[e] += std::fabs(product);
      }
    for (int64_t e = 0; e < k; ++e) {
      double sum = 0, low = 0, high = sizes[e];
      for (int64_t p = 0; p < all; ++p) {
        const double product = g_sums[i * all + p] * factor(p) * d(p, e);
        sum += product, low += std::fabs(product), high += std::fabs(g_sizes[i * all + p] * factor(p) * d(p, e));
      }
      const bool stays = c.threshold() == 0 || kept(in.seed, c.threshold(), i, e);
      dx.set(i * k + e, products[e] + (stays ? keep * sum : 0), stays ? keep * low : 0, high, unit);
    }
  }
  // Sums over the rows: of products of two columns, of which `rounded` says whether a factor had 16 bits.
  const auto over_rows = [&](Expected& out, int64_t index, const auto& left, const auto& right, double scale,
                             bool rounded) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < m; ++i) sum += scale * left(i) * right(i), size += std::fabs(scale * left(i) * right(i));
    out.set(index, sum, rounded ? size : 0, size * (1 + std::sqrt(static_cast<double>(m))), 0);
    if (rounded) out.allowed[index] += 2 * unit * size;
  };
  for (int64_t p = 0; p < rank; ++p) {
    const auto g = [&](int64_t i) { return g_sums[i * all + p]; };
    const auto low = [&](int64_t i) { return p_sums[i * all + p]; };
    for (int64_t e = 0; e < k; ++e)
      over_rows(da, p * k + e, g, [&](int64_t i) { return dropped[i * k + e]; }, in.scaling, true);
    for (int64_t j = 0; j < n; ++j)
      over_rows(db, j * rank + p, low, [&](int64_t i) { return in.dy[i * n + j]; }, in.scaling, true);
  }
  for (int64_t s = 0; s < c.directions; ++s) {
    const auto g = [&](int64_t i) { return g_sums[i * all + rank + s]; };
    over_rows(dsigma, s, g, [&](int64_t i) { return p_sums[i * all + rank + s]; }, 1, false);
  }
  for (int64_t j = 0; j < n; ++j)
    over_rows(dbias, j, [](int64_t) { return 1.0; }, [&](int64_t i) { return in.dy[i * n + j]; }, 1, false);
  return {y, dx, da, db, dsigma, dbias};
}

}  // namespace check
