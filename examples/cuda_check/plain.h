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
  // Absolute products are counted in `rounded` where a factor was rounded to 16 bits, in `exact` where none was.
  void set(int64_t index, double value, double rounded, double exact, double unit) {
    values[index] = value;
    allowed[index] = unit * (std::fabs(value) + 2 * rounded) + 1e-5 * (rounded + exact) + 1e-6;
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

// Everything of rank R, with the sums of absolute products beside each sum.
struct LowRank {
  int64_t all;
  std::vector<double> dropped;    // (M, K): x as dropout leaves it, scaled
  std::vector<double> p, p_size;  // (M, R)
  std::vector<double> g, g_size;  // (M, R)
};

// The operands by their places in D (R, K), Q (N, R) and c (R).
struct Factors {
  const Case& c;
  const Inputs& in;

  double d(int64_t p, int64_t i) const {
    return p < c.rank ? in.a[p * c.shape.k + i] : in.vt[(p - c.rank) * c.shape.k + i];
  }
  double q(int64_t j, int64_t p) const {
    return p < c.rank ? in.b[j * c.rank + p] : in.u[j * c.directions + p - c.rank];
  }
  double scale(int64_t p) const { return p < c.rank ? in.scaling : in.sigma[p - c.rank]; }
  bool keeps(int64_t m, int64_t k) const { return c.threshold() == 0 || kept(in.seed, c.threshold(), m, k); }
};

inline LowRank low_rank(const Factors& f) {
  const auto [m, k, n] = f.c.shape;
  const double keep = loradash::keep_scale(f.c.threshold());
  const int64_t all = f.c.rank + f.c.directions;
  const std::vector<double> zeros(m * all);
  LowRank low{all, std::vector<double>(m * k), zeros, zeros, zeros, zeros};
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t e = 0; e < k; ++e) low.dropped[i * k + e] = f.keeps(i, e) ? keep * f.in.x[i * k + e] : 0;
    for (int64_t p = 0; p < all; ++p) {
      const int64_t at = i * all + p;
      for (int64_t e = 0; e < k; ++e) {
        const double product = low.dropped[i * k + e] * f.d(p, e);
        low.p[at] += product, low.p_size[at] += std::fabs(product);
      }
      for (int64_t j = 0; j < n; ++j) {
        const double product = f.in.dy[i * n + j] * f.q(j, p);
        low.g[at] += product, low.g_size[at] += std::fabs(product);
      }
    }
  }
  return low;
}

inline Expected output(const Factors& f, const LowRank& low, double unit) {
  const auto [m, k, n] = f.c.shape;
  Expected y("y", m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = f.c.base ? f.in.base[i * n + j] : f.in.bias[j], exact = std::fabs(sum), rounded = 0;
      for (int64_t e = 0; e < k; ++e) {
        const double product = double(f.in.x[i * k + e]) * f.in.w[j * k + e];
        sum += product, exact += std::fabs(product);
      }
      for (int64_t p = 0; p < low.all; ++p) {
        const double factor = f.scale(p) * f.q(j, p), product = low.p[i * low.all + p] * factor;
        sum += product, rounded += std::fabs(product), exact += low.p_size[i * low.all + p] * std::fabs(factor);
      }
      y.set(i * n + j, sum, rounded, exact, unit);
    }
  }
  return y;
}

inline Expected input_gradient(const Factors& f, const LowRank& low, double unit) {
  const auto [m, k, n] = f.c.shape;
  const double keep = loradash::keep_scale(f.c.threshold());
  Expected dx("dx", m * k);
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> sums(k), sizes(k);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t e = 0; e < k; ++e) {
        const double product = double(f.in.dy[i * n + j]) * f.in.w[j * k + e];
        sums[e] += product, sizes[e] += std::fabs(product);
      }
    for (int64_t e = 0; e < k; ++e) {
      double rounded = 0;
      for (int64_t p = 0; f.keeps(i, e) && p < low.all; ++p) {
        const double factor = keep * f.scale(p) * f.d(p, e), product = low.g[i * low.all + p] * factor;
        sums[e] += product, rounded += std::fabs(product), sizes[e] += low.g_size[i * low.all + p] * std::fabs(factor);
      }
      dx.set(i * k + e, sums[e], rounded, sizes[e], unit);
    }
  }
  return dx;
}

// Sums over the rows, of products of two columns (pitch, first). Where `unit` is not 0, one of the two was rounded to
// 16 bits; results stay fp32.
struct Column {
  const double* first;
  int64_t pitch;
};
inline void over_rows(Expected& out, int64_t index, int64_t m, Column left, Column right, double scale, double unit) {
  double sum = 0, size = 0;
  for (int64_t i = 0; i < m; ++i) {
    const double product = scale * left.first[i * left.pitch] * right.first[i * right.pitch];
    sum += product, size += std::fabs(product);
  }
  out.set(index, sum, 0, size * (1 + std::sqrt(static_cast<double>(m))), 0);
  out.allowed[index] += 2 * unit * size;
}

// y, dx, dA, dB, the gradients of sigma and of the bias.
inline std::vector<Expected> plain(const Case& c, const Inputs& in) {
  const auto [m, k, n] = c.shape;
  const double unit = c.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048, one = 1;
  const Factors f{c, in};
  const LowRank low = low_rank(f);
  const std::vector<double> dy(in.dy.begin(), in.dy.end());
  Expected da("dA", c.rank * k), db("dB", n * c.rank), dsigma("dsigma", c.directions), dbias("dbias", n);
  for (int64_t p = 0; p < c.rank; ++p) {
    for (int64_t e = 0; e < k; ++e)
      over_rows(da, p * k + e, m, {&low.g[p], low.all}, {&low.dropped[e], k}, in.scaling, unit);
    for (int64_t j = 0; j < n; ++j)
      over_rows(db, j * c.rank + p, m, {&low.p[p], low.all}, {&dy[j], n}, in.scaling, unit);
  }
  for (int64_t p = c.rank; p < low.all; ++p)
    over_rows(dsigma, p - c.rank, m, {&low.g[p], low.all}, {&low.p[p], low.all}, 1, 0);
  for (int64_t j = 0; j < n; ++j) over_rows(dbias, j, m, {&one, 0}, {&dy[j], n}, 1, 0);
  return {output(f, low, unit), input_gradient(f, low, unit), da, db, dsigma, dbias};
}

}  // namespace check
