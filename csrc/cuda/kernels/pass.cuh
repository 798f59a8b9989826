// One pass over a large matrix X (m, n), for everything of rank R that is wanted of it: the skeleton of the
// down-projection (P from x), of the pass over dy (G, dB, db) and of the pass over x (dA).
//
//   projection  X F^T, F = D or Q^T (R, n), summed in registers over the columns of a program
//   reduction   X^T right, right = P_r or T (m, r), summed in registers over its rows
//
// 2 m n FLOPs for every rank projected on or reduced with (padded to 8), and X once: memory bounds it. X streams
// through shared memory in tiles of 64 x 128 by cp.async; dropout zeroes it there, each thread the chunks that it
// copied itself.
#pragma once

#include "cuda/params.h"
#include "cuda/tiles.h"
#include "order.cuh"
#include "philox.cuh"
#include "shared.cuh"

namespace loradash::cuda {

// kProject, kReduce and kBlocks are those of a PassKind.
template <typename T, int kProject_, int kReduce_, int kBlocks_, bool kAligned_>
struct PassTile {
  using Type = T;
  static constexpr int kProject = kProject_, kReduce = kReduce_, kBlocks = kBlocks_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kM = kPassRows, kN = kPassColumns, kStages = kPassStages, kThreads = kPassThreads;
  static constexpr PassKind kKind{kProject, kReduce, kBlocks};
  static constexpr int kProjected = kKind.projected(), kRanks = kKind.ranks();
  static constexpr bool kFactorStays = kKind.factor_stays();
  static constexpr bool kFactorStreams = kProject > 0 && !kFactorStays;
  using X = SharedTile<kM, kN>;
  using F = SharedTile<kProject ? kProjected : kFragmentRanks, kN>;
  static constexpr int kRightPitch = kKind.right_pitch();
  static constexpr int kRightBytes = kKind.right_bytes();
  static constexpr int kStageBytes = kKind.stage_bytes();
  static constexpr int kRightAt = kKind.right_at();
  static constexpr int kFactorAt = kKind.factor_at();
  static constexpr int kScratchAt = kKind.scratch_at();
  static_assert(kStageBytes == X::kBytes + (kFactorStreams ? F::kBytes : 0));
};

// The factor c of a rank is scaling for those of LoRA, Δσ for the directions.
__device__ __forceinline__ float column_factor(const PassParams& p, int rank) {
  if (rank < p.rank) return p.scaling;
  return rank < p.rank + p.directions ? p.dash_sigma[rank - p.rank] : 0.0f;
}

// What a program takes at a time: a chunk of columns, a split of rows, a group of ranks. Partial sums of the projection
// go to one of `slots` places: each is the sum over the chunks that one program walks, in order. Where one `adds`,
// those of earlier chunks lie there; the one that `finishes` is the last of its slot.
struct PassPart {
  int chunk, slot, slots;
  bool adds, finishes;
  int split, group;
};

template <typename Tile>
struct Pass {
  using T = typename Tile::Type;
  using CopyX = TileCopy<T, typename Tile::X, Tile::kThreads, Tile::kAligned>;
  using CopyF = TileCopy<T, typename Tile::F, Tile::kThreads, true>;
  static constexpr int kProjects = Tile::kProject ? Tile::kProject : 1, kReduces = Tile::kReduce ? Tile::kReduce : 1;

  const PassParams& p;
  char* const memory;
  const uint32_t shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A lane's addresses inside a tile of X, of F and of the right operand.
  uint32_t project_x = Tile::X::offset(16 * warp + lane % 16, lane / 16);
  uint32_t project_f = Tile::F::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t reduce_x = Tile::X::offset(lane % 8 + lane / 16 * 8, 4 * warp + lane / 8 % 2);
  uint32_t reduce_right = lane % 16 * Tile::kRightPitch;
  const PassPart part;
  // Blocks are of 128 columns.
  const int column0, row0, row_end, blocks, first_rank;
  float projected[kProjects][4];
  float reduced[Tile::kBlocks][2][kReduces][4];

  __device__ __forceinline__ Pass(const PassParams& params, char* memory_in, const PassPart& part_in)
      : p(params),
        memory(memory_in),
        shared(shared_address(memory_in)),
        part(part_in),
        column0(part.chunk * params.columns_per_cta),
        row0(part.split * params.rows_per_cta),
        row_end(min(params.m, row0 + params.rows_per_cta)),
        blocks(Tile::kReduce ? Tile::kBlocks
                             : (min(params.n - column0, params.columns_per_cta) + Tile::kN - 1) / Tile::kN),
        first_rank(part.group * Tile::kRanks) {
#pragma unroll
    for (auto& block : reduced)
      for (auto& half : block)
        for (auto& fragment : half)
          for (float& value : fragment) value = 0.0f;
    pin(project_x), pin(project_f), pin(reduce_x), pin(reduce_right);
  }

  __device__ __forceinline__ uint32_t stage(int index) const { return shared + index * Tile::kStageBytes; }

  __device__ __forceinline__ void load_factor(uint32_t to, int column) const {
    const T* from = static_cast<const T*>(p.factor) + (first_rank + CopyF::row()) * p.ldf + column + CopyF::column();
    const int ranks = p.width - first_rank, columns = static_cast<int>(p.ldf) - column;
    if (ranks >= Tile::F::kRows && columns >= Tile::kN) {
      CopyF::load_whole(to + CopyF::place(), from, CopyF::kStep * p.ldf * sizeof(T));
    } else {
      CopyF::load(to + CopyF::place(), from, p.ldf, ranks, columns);
    }
  }

  // Copies tile (row, block) of X into a stage, with what streams along, and, for the first block of a row, the right
  // operand into `slot`.
  __device__ __forceinline__ void load(int to, int slot, int row, int block) const {
    const int column = column0 + block * Tile::kN;
    const T* from = static_cast<const T*>(p.x) + (row + CopyX::row()) * p.ldx + column + CopyX::column();
    if (Tile::kAligned && row_end - row >= Tile::kM && p.n - column >= Tile::kN) {
      CopyX::load_whole(stage(to) + CopyX::place(), from, CopyX::kStep * p.ldx * sizeof(T));
    } else {
      CopyX::load(stage(to) + CopyX::place(), from, p.ldx, row_end - row, p.n - column);
    }
    if constexpr (Tile::kFactorStreams) load_factor(stage(to) + Tile::X::kBytes, column);
    if constexpr (Tile::kReduce > 0) {
      if (block != 0) return;
      for (int i = threadIdx.x; i < Tile::kM * Tile::kReduce; i += Tile::kThreads) {
        const int r = i / Tile::kReduce, c = i % Tile::kReduce, rank = first_rank + c * kChunk;
        const T* right = static_cast<const T*>(p.right) + (row + r) * p.ld_right + rank;
        const uint32_t at =
            shared + Tile::kRightAt + slot * Tile::kRightBytes + r * Tile::kRightPitch + c * kChunkBytes;
        copy_async(at, right, row + r < row_end && rank < p.ld_right);
      }
    }
  }

  // Applies dropout to what this thread copied itself: no barrier is needed before.
  __device__ __forceinline__ void drop(const Dropout16& dropout, const PhiloxRow (&rows)[CopyX::kCount], int index,
                                       int block) const {
    const PhiloxColumn column = dropout.column((column0 + block * Tile::kN + CopyX::column()) / kChunk);
    const uint32_t at = stage(index) + CopyX::place();
    unrolled<CopyX::kCount>([&](auto i) {
      constexpr int kOffset = i * CopyX::kStep * Tile::X::kRowBytes;
      const uint4 chunk = load_shared<kOffset>(at), keep = dropout.masks(rows[i], column);
      store_shared<kOffset>(at, make_uint4(chunk.x & keep.x, chunk.y & keep.y, chunk.z & keep.z, chunk.w & keep.w));
    });
  }

  // Projects sixteen rows a warp. In rows of 256 bytes that begin at a multiple of 256, two chunks further is another
  // bit of the address.
  __device__ __forceinline__ void project(uint32_t x, uint32_t f) {
    const uint32_t from_x = x + project_x, from_f = f + project_f;
    unrolled<Tile::kN / 16>([&](auto k) {
      uint32_t a[4];
      load_matrices<false>(a, from_x ^ (k * 32));
      unrolled<Tile::kProject / 2>([&](auto j) {
        uint32_t b[4];
        load_matrices<false, j * 16 * Tile::F::kRowBytes>(b, from_f ^ (k * 32));
        Element<T>::mma(projected[2 * j], a, b);
        Element<T>::mma(projected[2 * j + 1], a, b + 2);
      });
    });
  }

  // Reduces thirty-two columns of a block a warp.
  __device__ __forceinline__ void reduce(float (&sums)[2][kReduces][4], uint32_t x, uint32_t right) const {
    const uint32_t from_x = x + reduce_x, from_right = right + reduce_right;
    unrolled<Tile::kM / 16>([&](auto m) {
      uint32_t a[2][4], b[kReduces + 1][2];
      load_matrices<true, m * 16 * Tile::X::kRowBytes>(a[0], from_x);
      load_matrices<true, m * 16 * Tile::X::kRowBytes>(a[1], from_x ^ 32);
      unrolled<Tile::kReduce / 2>([&](auto j) {
        constexpr int kOffset = m * 16 * Tile::kRightPitch + j * 32;
        load_matrices<true, kOffset>(reinterpret_cast<uint32_t (&)[4]>(b[2 * j]), from_right + lane / 16 * 16);
      });
      if constexpr (Tile::kReduce % 2) {
        load_two_matrices<m * 16 * Tile::kRightPitch + (Tile::kReduce - 1) * 16>(b[Tile::kReduce - 1], from_right);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kReduce; ++j) Element<T>::mma(sums[i][j], a[i], b[j]);
      }
    });
  }

  __device__ __forceinline__ void run() {
    const int row_blocks = (row_end - row0 + Tile::kM - 1) / Tile::kM;
    if constexpr (Tile::kFactorStays) {
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) {
        load_factor(shared + Tile::kFactorAt + block * Tile::F::kBytes, column0 + block * Tile::kN);
      }
    }
    // Where the tile to fetch next comes from and goes to.
    int ahead_row = 0, ahead_block = 0, ahead_stage = 0, ahead_slot = 0;
    const auto prefetch = [&] {
      if (ahead_row < row_blocks) {
        load(ahead_stage, ahead_slot, row0 + ahead_row * Tile::kM, ahead_block);
        if (++ahead_block == blocks) {
          ahead_block = 0, ++ahead_row;
          ahead_slot = ahead_slot == Tile::kStages - 1 ? 0 : ahead_slot + 1;
        }
      }
      commit_copies();
      ahead_stage = ahead_stage == Tile::kStages - 1 ? 0 : ahead_stage + 1;
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) prefetch();
    const Dropout16 dropout(p);
    int index = 0, slot = 0;
    for (int r = 0; r < row_blocks; ++r) {
      const int row = row0 + r * Tile::kM;
      PhiloxRow rows[CopyX::kCount];
      if (dropout.active) {
#pragma unroll
        for (int i = 0; i < CopyX::kCount; ++i) rows[i] = dropout.row(row + CopyX::row() + i * CopyX::kStep);
      }
#pragma unroll
      for (auto& fragment : projected)
        for (float& value : fragment) value = 0.0f;
      const auto step = [&](int block, float (&sums)[2][kReduces][4]) {
        wait_copies<Tile::kStages - 2>();
        if (dropout.active) drop(dropout, rows, index, block);
        __syncthreads();
        prefetch();
        const uint32_t x = stage(index);
        if constexpr (Tile::kProject > 0) {
          project(x, Tile::kFactorStays ? shared + Tile::kFactorAt + block * Tile::F::kBytes : x + Tile::X::kBytes);
        }
        if constexpr (Tile::kReduce > 0) reduce(sums, x, shared + Tile::kRightAt + slot * Tile::kRightBytes);
        index = index == Tile::kStages - 1 ? 0 : index + 1;
      };
      if constexpr (Tile::kReduce > 0) {
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) step(block, reduced[block]);
      } else {
        for (int block = 0; block < blocks; ++block) step(block, reduced[0]);
      }
      slot = slot == Tile::kStages - 1 ? 0 : slot + 1;
      if constexpr (Tile::kProject > 0) {
        if (Tile::kFactorStays || part.slots > 1) {
          store_partial(row);
          if (part.finishes) add_partials(row);
        } else {
          store_projection(row);
        }
      }
    }
    wait_copies<0>();
    if constexpr (Tile::kReduce > 0) store_reduction();
  }

  // Stores P and T = P * c, which are complete: this program saw all columns.
  __device__ __forceinline__ void store_projection(int row) const {
    const int all = p.rank + p.directions;
#pragma unroll
    for (int j = 0; j < Tile::kProject; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = row + 16 * warp + lane / 4 + e / 2 * 8;
        const int rank = first_rank + kFragmentRanks * j + lane % 4 * 2 + e % 2;
        if (m >= row_end || rank >= p.width) continue;
        const float value = projected[j][e] * p.keep_scale;
        if (rank < all) p.sums[m * all + rank] = value;
        static_cast<T*>(p.scaled)[m * p.width + rank] = Element<T>::from_float(value * column_factor(p, rank));
      }
    }
  }

  // A thread adds to what it stored itself: no other knows of it before the last chunk.
  __device__ __forceinline__ void store_partial(int row) const {
    const int all = p.rank + p.directions;
    float* const sums = p.projected + static_cast<int64_t>(part.slot) * p.m * all;
#pragma unroll
    for (int j = 0; j < Tile::kProject; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = row + 16 * warp + lane / 4 + e / 2 * 8;
        const int rank = first_rank + kFragmentRanks * j + lane % 4 * 2 + e % 2;
        if (m >= row_end || rank >= all) continue;
        sums[m * all + rank] = part.adds ? sums[m * all + rank] + projected[j][e] : projected[j][e];
      }
    }
  }

  // The last slot to arrive at a block of rows adds all of them, in the order of the columns whoever it is.
  __device__ __forceinline__ void add_partials(int row) const {
    constexpr int kRanks = Tile::kProjected, kRows = Tile::kThreads / kRanks;
    PassScratch& scratch = *reinterpret_cast<PassScratch*>(memory + Tile::kScratchAt);
    float* const sums = scratch.sums;
    volatile bool& last = scratch.last;
    const int all = p.rank + p.directions, row_block = row / Tile::kM, row_blocks = (p.m + Tile::kM - 1) / Tile::kM;
    __syncthreads();
    if (threadIdx.x == 0) last = arrive(p.arrived + part.group * row_blocks + row_block) == part.slots - 1;
    __syncthreads();
    if (!last) return;
    const int rank = first_rank + threadIdx.x % kRanks;
    const float factor = column_factor(p, rank);
    float sigma = 0.0f;
    for (int r = threadIdx.x / kRanks; r < Tile::kM; r += kRows) {
      const int64_t m = row + r;
      if (m >= row_end || rank >= p.width) continue;
      float g = 0.0f;
      if (rank < all) {
        for (int slot = 0; slot < part.slots; ++slot)
          g += __ldcg(p.projected + (slot * static_cast<int64_t>(p.m) + m) * all + rank);
        g *= p.keep_scale;
        if (p.sums) p.sums[m * all + rank] = g;
        if (p.dsigma_parts && rank >= p.rank) sigma += g * p.p[m * all + rank];
      }
      static_cast<T*>(p.scaled)[m * p.width + rank] = Element<T>::from_float(g * factor);
    }
    if (!p.dsigma_parts) return;
    sums[threadIdx.x] = sigma;
    __syncthreads();
    if (threadIdx.x < kRanks && rank >= p.rank && rank < all) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) total += sums[threadIdx.x + i * kRanks];
      p.dsigma_parts[static_cast<int64_t>(row_block) * p.directions + rank - p.rank] = total;
    }
  }

  __device__ __forceinline__ void store_reduction() const {
    if (!p.reduced) return;
#pragma unroll
    for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kReduce; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = column0 + block * Tile::kN + 32 * warp + 16 * i + lane / 4 + e / 2 * 8;
            const int rank = first_rank + kFragmentRanks * j + lane % 4 * 2 + e % 2;
            if (column >= p.n || rank >= p.right_columns) continue;
            p.reduced[(static_cast<int64_t>(part.split) * p.right_columns + rank) * p.n + column] =
                reduced[block][i][j][e];
          }
        }
      }
    }
  }
};

// Takes the chunks of columns of a slot, from left to right. A program that keeps its factor has few columns and walks;
// the others take one chunk of any width.
template <typename Tile>
__device__ __forceinline__ void pass_slot(const PassParams& p, char* memory, int slot, int slots, int split,
                                          int group) {
  if constexpr (Tile::kFactorStays) {
    const int first = slot * p.walk, end = min(first + p.walk, p.chunks);
    for (int chunk = first; chunk < end; ++chunk) {
      if (chunk > first) __syncthreads();
      Pass<Tile>(p, memory, {chunk, slot, slots, chunk > first, chunk + 1 == end, split, group}).run();
    }
  } else {
    Pass<Tile>(p, memory, {slot, slot, slots, false, true, split, group}).run();
  }
}

template <typename Tile>
__device__ __forceinline__ void pass(const PassParams& p) {
  extern __shared__ __align__(256) char memory[];
  pass_slot<Tile>(p, memory, blockIdx.x, gridDim.x, blockIdx.y, blockIdx.z);
}

}  // namespace loradash::cuda
