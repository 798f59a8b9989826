// From a problem to launches: which kernels, tiles, grids and workspace a call takes. Pure functions of numbers and
// pointers that are not followed: no CUDA, no Torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/params.h"
#include "problem.h"

namespace loradash::cuda {

// The most that r + s may be.
constexpr int64_t kMaxWidth = 256;

// What a card offers: processors, and bytes of shared memory that a block may take.
struct Card {
  int32_t processors;
  int32_t shared_limit;
};

// W (N, K); one of its strides is 1. No data: there is none.
struct Weight {
  const void* data;
  int64_t stride_n, stride_k;

  bool stored_by_columns() const { return data && stride_n == 1 && stride_k != 1; }
};

// A low-rank matrix of any of the three dtypes.
struct TypedMatrix {
  const void* data;
  DType dtype;
};

// The seed lies on the card: reading it would wait for the card. No seed: no dropout.
struct DeviceDropout {
  const int64_t* seed;
  uint32_t threshold;
  // Null, or where x begins in the matrix whose mask is drawn: row and column.
  const int64_t* window = nullptr;

  float keep_scale() const { return seed ? loradash::keep_scale(threshold) : 1.0f; }
};

struct Problem {
  Shape shape;
  // The dtype of x, W, bias, base, y, dy and dx: bf16 or fp16.
  DType dtype;
  const void* x;  // (M, K), row stride ldx
  int64_t ldx;
  Weight weight;
  Adapters<TypedMatrix> adapters;
  DeviceDropout dropout;
  Card card;
};

struct ForwardOut {
  const void* bias;  // (N) or null
  const void* base;  // (M, N), contiguous, or null
  void* y;           // (M, N)
  float* p;          // (M, R)
};

// Gradients are null where they are not wanted.
struct BackwardOut {
  const void* dy;  // (M, N), row stride lddy
  int64_t lddy;
  const float* p;  // (M, R)
  void* dx;        // (M, K)
  float* da;       // (r, K)
  float* db_lora;  // (N, r)
  float* dsigma;   // (s)
  float* dbias;    // (N)
};

// The launches are in order; the workspace that they use is known with workspace = null too.
struct Plan {
  std::vector<KernelLaunch> launches;
  int64_t workspace_bytes;
};

// `tile` forces one of `gemm_tiles` by name ("128x128", "one_launch_128x128"); "" leaves the choice to the table, which
// knows nothing of one launch: only a measurement chooses that. A tile that the problem does not allow is not taken.
// Where there are no rows, there are no launches, and gradients are the caller's to zero (those of N = 0 too).
Plan plan_forward(const Problem& problem, const ForwardOut& out, void* workspace, const std::string& tile = "");
Plan plan_backward(const Problem& problem, const BackwardOut& out, void* workspace, const std::string& tile = "");

// Returns the names of the tiles that fit a card, largest first.
std::vector<std::string> gemm_tiles(const Card& card);

}  // namespace loradash::cuda
