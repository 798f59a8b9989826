// From a problem to launches: which kernels, tiles, grids and workspace a call takes. Pure functions of numbers and
// pointers that are not followed: no CUDA, no Torch.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/params.h"
#include "problem.h"

namespace loradash::cuda {

constexpr int64_t kMaxWidth = 256;  // of r + s

// What a card offers.
struct Card {
  int32_t processors;
  int32_t shared_limit;  // bytes a block may take
};

struct Problem {
  Shape shape;
  DType dtype;  // of x, W, bias, base, y, dy and dx: bf16 or fp16
  const void* x;
  int64_t ldx;
  const void* weight;          // null: none
  int64_t weight_n, weight_k;  // strides of W; one of them is 1
  const void* adapters[4];     // A (r, K), B (N, r), U (N, s), Vt (s, K): contiguous
  DType adapter_dtypes[4];
  const float* dash_sigma;
  int64_t rank, directions;
  float scaling;
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  Card card;

  int64_t width() const { return rank + directions; }
};

struct ForwardOut {
  const void* bias;  // (N) or null
  const void* base;  // (M, N), contiguous, or null
  void* y;           // (M, N)
  float* p;          // (M, R)
};

// Null where not wanted.
struct BackwardOut {
  const void* dy;
  int64_t lddy;
  const float* p;  // (M, R)
  void* dx;        // (M, K)
  float *da, *db_lora, *dsigma, *dbias;
};

struct Plan {
  std::vector<Launch> launches;
  int64_t workspace_bytes;  // that the launches use; known with workspace = null too
};

// `tile` forces one of `gemm_tiles` by name ("128x128", "one_launch_128x128"); "" leaves the choice to the table, which
// knows nothing of one launch: only a measurement chooses that. A tile that the problem does not allow is not taken.
// No rows: no launches, and gradients are the caller's to zero (those of N = 0 too).
Plan plan_forward(const Problem& problem, const ForwardOut& out, void* workspace, const std::string& tile = "");
Plan plan_backward(const Problem& problem, const BackwardOut& out, void* workspace, const std::string& tile = "");

// Names of the tiles that fit a card, largest first.
std::vector<std::string> gemm_tiles(const Card& card);

}  // namespace loradash::cuda
