// What the CUDA kernels are launched with, and their launches as data. No CUDA here: the plan is made, read and tested
// anywhere.
//
// The letters are those of problem.h. "Width" is R padded to kRankStep, as the packed operands of the rank columns are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace loradash::cuda {

// Rank columns are steps of the K loop.
constexpr int kRankStep = 32;

// C (m, n) = A0 B0 + A1 B1 + bias + base, 16-bit operands, fp32 sums. `depth` runs along the rows of A and of B
// (kColumns false) or along the rows of A and down the columns of B.
struct Segment {
  const void* a;
  const void* b;
  int64_t lda, ldb;
  int32_t depth;
};

struct GemmParams {
  // They are multiplied in this order.
  Segment segments[2];
  int32_t m, n, tiles_m, tiles_n, group_m;
  // Are rows of out and base whole 16-byte chunks?
  int32_t whole;
  void* out;         // (m, n), contiguous
  const void* bias;  // (n) or null
  const void* base;  // (m, n), contiguous, or null
  // Null: no dropout.
  const int64_t* seed;
  // The first row and column of the window that the mask is that of; null: it begins with the mask.
  const int64_t* window;
  // The mask falls on what the first segment gave (dx), which is then scaled by keep_scale.
  uint32_t threshold;
  float keep_scale;
};

enum Adapter { kLoraA, kLoraB, kDashU, kDashVt };

// Low-rank operands, rounded to the dtype of x, zero beyond R and (in rows) beyond the matrix.
struct PackParams {
  const void* lora_a;   // (r, K)
  const void* lora_b;   // (N, r)
  const void* dash_u;   // (N, s)
  const void* dash_vt;  // (s, K)
  // DTypes, by Adapter.
  int32_t adapter_dtype[4];
  int32_t rank, directions, width;
  int64_t k, n, m;
  // The forms that are wanted: D, D^T, Q^T and Q; null for the others.
  void* d_rows;     // (width, ldd)
  void* d_columns;  // (K, width)
  void* q_rows;     // (width, ldq)
  void* q_columns;  // (N, width)
  int64_t ldd, ldq;
  const float* p;  // (M, R)
  // P_r, then a column of ones (whose products are column sums), then zeros; null where it is not wanted.
  void* p_low;  // (M, p_width)
  int32_t p_width;
  // Packing sets these counters to zero.
  int32_t* counters;
  int32_t counter_count;
};

// One pass over a tall matrix X (m, n): projects its rows on up to `width` ranks, and reduces it over rows.
struct PassParams {
  const void* x;
  int64_t ldx;
  int32_t m, n;
  // The columns are divided into chunks of `columns_per_cta`; a program walks so many of them.
  int32_t rows_per_cta, columns_per_cta, chunks, walk;
  // Null: no dropout.
  const int64_t* seed;
  // The first row and column of the window that the mask is that of; null: it begins with the mask.
  const int64_t* window;
  uint32_t threshold;
  float keep_scale;
  int32_t rank, directions, width;
  // The projection sums X F^T over the columns.
  const void* factor;  // F (width, ldf)
  int64_t ldf;
  // Partial sums of the columns that each program walks; not used where one takes all, in a pass without a reduction.
  float* projected;  // (programs along the columns, m, R)
  // P, the sums times keep_scale; or null.
  float* sums;  // (m, R)
  // T = sums * c.
  void* scaled;  // (m, width)
  float scaling;
  const float* dash_sigma;
  // One counter for each group of ranks and block of rows; the last program to arrive adds all partial sums.
  int32_t* arrived;
  // Where P is given, the last program to arrive also leaves partial sums of G_s P_s.
  const float* p;       // (m, R)
  float* dsigma_parts;  // (blocks of rows, s)
  // The reduction sums X^T right over the rows, for the first `right_columns` of right.
  const void* right;  // (m, ld_right)
  int64_t ld_right;
  int32_t right_columns;
  float* reduced;  // (row splits, right_columns, n)
};

// A product and the pass over its left operand in one launch: one program walks all columns of a block of rows. The
// state is 2 tiles_m counters, zero on entry: arrivals, then flags.
struct OneLaunchParams {
  GemmParams gemm;
  PassParams pass;
  int32_t* state;
};

// Sums over splits, in order.
struct FinishParams {
  const float* da_parts;  // (splits_x, r, K)
  const float* dy_parts;  // (splits_y, dy_columns, N): r columns of dB, one of db
  const float* dsigma_parts;
  float *da, *db_lora, *dsigma, *dbias;
  int64_t k, n;
  int32_t rank, directions, splits_x, splits_y, dy_columns, sigma_blocks;
  float scale_a, scale_b;
};

// A kernel, named as its entry point in the .cu files, and everything that it is launched with.
struct KernelLaunch {
  std::string kernel;
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  std::vector<unsigned char> params;
};

}  // namespace loradash::cuda
