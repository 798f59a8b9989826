// What the GPU kernels are launched with, and their launches as data. No CUDA here: the plan is made, read and tested
// anywhere.
//
// Letters as in dash_linear.h. "Width" is R padded to kRankStep, as the packed operands of the rank columns are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace loradash::cuda {

constexpr int kRankStep = 32;  // rank columns are steps of the K loop

// C (m, n) = A0 B0 + A1 B1 + bias + base, 16-bit operands, fp32 sums. `depth` runs along the rows of A and of B
// (kColumns false) or along the rows of A and down the columns of B.
struct Segment {
  const void* a;
  const void* b;
  int64_t lda, ldb;
  int32_t depth;
};

struct GemmParams {
  Segment segments[2];  // in this order
  int32_t m, n, tiles_m, tiles_n, group_m;
  int32_t whole;        // are rows of out and base whole 16-byte chunks?
  void* out;            // (m, n), contiguous
  const void* bias;     // (n) or null
  const void* base;     // (m, n), contiguous, or null
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;   // of the mask on what the first segment gave (dx), which is then scaled by keep_scale
  float keep_scale;
};

// Low-rank operands, rounded to the dtype of x, zero beyond R and (in rows) beyond the matrix.
struct PackParams {
  const void* lora_a;        // (r, K)
  const void* lora_b;        // (N, r)
  const void* dash_u;        // (N, s)
  const void* dash_vt;       // (s, K)
  int32_t adapter_dtype[4];  // DType of each
  int32_t rank, directions, width;
  int64_t k, n, m;
  void* d_rows;     // D (width, ldd) or null
  void* d_columns;  // D^T (K, width) or null
  void* q_rows;     // Q^T (width, ldq) or null
  void* q_columns;  // Q (N, width) or null
  int64_t ldd, ldq;
  const float* p;  // (M, R), for p_low
  void* p_low;     // (M, p_width): P_r, then a column of ones (whose products are column sums), then zeros; or null
  int32_t p_width;
  int32_t* counters;  // set to zero
  int32_t counter_count;
};

// One pass over a tall matrix X (m, n): projects its rows on up to `width` ranks, and reduces it over rows.
struct PassParams {
  const void* x;
  int64_t ldx;
  int32_t m, n;
  int32_t rows_per_cta, columns_per_cta;
  const int64_t* seed;  // null: no dropout
  uint32_t threshold;
  float keep_scale;
  int32_t rank, directions, width;
  // Projection: sums of X F^T, F (width, ldf).
  const void* factor;
  int64_t ldf;
  float* projected;  // (column chunks, m, R) partial; not used where there is one chunk, of a pass without a reduction
  float* sums;       // P (m, R), the sums times keep_scale; or null
  void* scaled;      // T = (sums * c) (m, width)
  float scaling;
  const float* dash_sigma;
  int32_t* arrived;     // per rank group and block of rows; the last chunk to arrive adds them all
  const float* p;       // (m, R); with it, the last one also leaves partial sums of G_s P_s
  float* dsigma_parts;  // (blocks of rows, s)
  // Reduction: X^T right, right (m, ld_right), of which the first `right_columns`.
  const void* right;
  int64_t ld_right;
  int32_t right_columns;
  float* reduced;  // (row splits, right_columns, n)
};

// A product and the pass over its left operand in one launch; state: 2 tiles_m counters, zero on entry (arrivals, then
// flags).
struct OneLaunchParams {
  GemmParams gemm;
  PassParams pass;
  int32_t chunks;  // of columns, of the pass
  int32_t* state;
};

// Sums over splits, in order.
struct FinishParams {
  const float* da_parts;  // (splits_x, r, K)
  const float* dy_parts;  // (splits_y, r + 1 or r or 1, N)
  const float* dsigma_parts;
  float *da, *db_lora, *dsigma, *dbias;
  int64_t k, n;
  int32_t rank, directions, splits_x, splits_y, dy_columns, sigma_blocks;
  float scale_a, scale_b;
};

// One launch. `kernel` is the name of an entry point in the .cu files.
struct Launch {
  std::string kernel;
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
  std::vector<unsigned char> params;
};

}  // namespace loradash::cuda
