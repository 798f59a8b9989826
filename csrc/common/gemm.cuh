// One GEMM for the forward product and for dx: C = A0 B0 + A1 B1, the K loop running on from the first pair of operands into the
// second without a break in the pipeline.
//
//   forward: [x | T] [W | Q]^T, bias in the epilogue.    dx: (T D, masked in registers) + dy W.
//
// 2 m n (depth0 + depth1) FLOPs, both depths padded to kDepth; reads A and B once as far as L2 holds a group of tiles, writes C
// once. A multistage pipeline in the manner of CUTLASS's sm_80 main loop: kStages - 1 tiles in flight by cp.async, fragments
// of the next 16 columns loaded while the tensor cores multiply these.
#pragma once

#include "../gpu_params.h"
#include "philox.cuh"
#include "shared.cuh"

namespace loradash::gpu {

// kColumns: B is stored (depth, n), rows along n; else (n, depth), rows along the depth.
template <typename T, int kM_, int kN_, int kDepth_, int kWarpsM_, int kWarpsN_, int kStages_, bool kColumns_, bool kAligned_>
struct GemmTile {
  using Type = T;
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr bool kColumns = kColumns_, kAligned = kAligned_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;  // of C, per warp
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  using A = SharedTile<kM, kDepth>;
  using B = std::conditional_t<kColumns, SharedTile<kDepth, kN>, SharedTile<kN, kDepth>>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kStageRow = kWarpN + 8;  // floats of a row of staged results: eight more keep rows in different banks
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kWarpsM * kWarpsN * 16 * kStageRow * 4 <= kSharedBytes, "results are staged where the operands were");
};

// Where the next tile of both operands comes from; each thread knows its own first elements.
template <typename Tile>
struct OperandStream {
  using T = typename Tile::Type;
  using CopyA = TileCopy<T, typename Tile::A, Tile::kThreads, Tile::kAligned>;
  using CopyB = TileCopy<T, typename Tile::B, Tile::kThreads, Tile::kAligned>;
  const T *a, *b;
  int64_t lda, ldb;
  int rows_left, columns_left, depth_left;

  __device__ __forceinline__ void begin(const Segment& s, int m0, int n0, int m, int n) {
    lda = s.lda, ldb = s.ldb, depth_left = s.depth;
    rows_left = m - m0, columns_left = n - n0;
    a = static_cast<const T*>(s.a) + (m0 + CopyA::row()) * lda + CopyA::column();
    b = static_cast<const T*>(s.b);
    b += Tile::kColumns ? CopyB::row() * ldb + n0 + CopyB::column() : (n0 + CopyB::row()) * ldb + CopyB::column();
  }

  __device__ __forceinline__ void next(uint32_t to_a, uint32_t to_b) {
    CopyA::load(to_a, a, lda, rows_left, depth_left);
    if constexpr (Tile::kColumns) {
      CopyB::load(to_b, b, ldb, depth_left, columns_left);
      b += Tile::kDepth * ldb;
    } else {
      CopyB::load(to_b, b, ldb, columns_left, depth_left);
      b += Tile::kDepth;
    }
    a += Tile::kDepth;
    depth_left -= Tile::kDepth;
  }
};

// What a warp multiplies next: 16 columns of its rows of A and of B, read by ldmatrix.
template <typename Tile>
struct Fragments {
  uint32_t a[Tile::kFragmentsM][4], b[Tile::kFragmentsN / 2][4];
};

// Addresses of a lane's fragments inside a stage, worked out once.
template <typename Tile>
struct FragmentReader {
  uint32_t a[Tile::kDepth / 16];
  uint32_t b[Tile::kColumns ? Tile::kFragmentsN / 2 : Tile::kDepth / 16];

  __device__ __forceinline__ FragmentReader() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int m0 = warp / Tile::kWarpsN * Tile::kWarpM, n0 = warp % Tile::kWarpsN * Tile::kWarpN;
#pragma unroll
    for (int k = 0; k < Tile::kDepth / 16; ++k) a[k] = Tile::A::offset(m0 + lane % 16, 2 * k + lane / 16);
    if constexpr (Tile::kColumns) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN / 2; ++j) {
        b[j] = Tile::A::kBytes + Tile::B::offset(lane % 16, n0 / kChunk + 2 * j + lane / 16);
      }
    } else {
#pragma unroll
      for (int k = 0; k < Tile::kDepth / 16; ++k) {
        b[k] = Tile::A::kBytes + Tile::B::offset(n0 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
      }
    }
  }

  // Sixteen rows further down lies the same swizzle: an immediate offset.
  __device__ __forceinline__ void read(Fragments<Tile>& f, uint32_t stage, int k) const {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      load_matrices<false>(f.a[i], stage + a[k] + i * 16 * Tile::A::kChunks * 16);
    }
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN / 2; ++j) {
      if constexpr (Tile::kColumns) {
        load_matrices<true>(f.b[j], stage + b[j] + k * 16 * Tile::B::kChunks * 16);
      } else {
        load_matrices<false>(f.b[j], stage + b[k] + j * 16 * Tile::B::kChunks * 16);
      }
    }
  }
};

template <typename Tile>
struct Accumulator {
  float c[Tile::kFragmentsM][Tile::kFragmentsN][4];

  __device__ __forceinline__ Accumulator() {
#pragma unroll
    for (auto& row : c)
      for (auto& fragment : row)
        for (float& value : fragment) value = 0.0f;
  }

  __device__ __forceinline__ void add(const Fragments<Tile>& f) {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) Element<typename Tile::Type>::mma(c[i][j], f.a[i], &f.b[j / 2][j % 2 * 2]);
    }
  }

  // Zeroes what dropout drops of C at (m0, n0), scales the rest. A 16 x 16 part of C has 32 blocks of eight neighbours: each
  // lane draws one, and the four lanes of a row exchange their bits.
  __device__ __forceinline__ void mask(const DropoutKey& dropout, float scale, int m0, int n0) {
    const int lane = threadIdx.x % 32, part = lane % 4;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        const int row = m0 + 16 * i + lane / 4 + part % 2 * 8, block = (n0 + 8 * j) / kChunk + part / 2;
        uint32_t bits = keep_bits(dropout, row, block) << (8 * part);
        bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 1);
        bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 2);
#pragma unroll
        for (int e = 0; e < 8; ++e) {  // two fragments: column 2 part + e % 2, row + 8 from element 2 on
          float& value = c[i][j + e / 4][e % 4];
          const int bit = 16 * (e / 4) + 8 * (e % 4 / 2) + 2 * part + e % 2;
          value = (bits >> bit) & 1 ? value * scale : 0.0f;
        }
      }
    }
  }
};

// Rounds once, after bias and base: rows of fp32 go through shared memory, so that a lane stores 16 bytes of a row.
template <typename Tile>
__device__ __forceinline__ void store_output(const Accumulator<Tile>& acc, const GemmParams& p, char* shared, int m0, int n0) {
  using T = typename Tile::Type;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* staged = reinterpret_cast<float*>(shared) + warp * 16 * Tile::kStageRow;
  m0 += warp / Tile::kWarpsN * Tile::kWarpM, n0 += warp % Tile::kWarpsN * Tile::kWarpN;
  constexpr int kLanes = Tile::kWarpN / kChunk, kRows = 32 / kLanes;  // lanes that store a row, rows at a time
  const int column = n0 + lane % kLanes * kChunk;
  const bool whole = p.whole;
  float bias[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const bool inside = p.bias && column + e < p.n;
    bias[e] = inside ? Element<T>::to_float(static_cast<const T*>(p.bias)[column + e]) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = staged + (lane / 4 + 8 * half) * Tile::kStageRow + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(acc.c[i][j][2 * half], acc.c[i][j][2 * half + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 16; r += kRows) {
      const int row = r + lane / kLanes, m = m0 + 16 * i + row;
      // Lanes 4 to 7 of eight read their second half first: otherwise eight lanes would want every second 16 bytes.
      const int swap = lane / 4 % 2;
      float values[kChunk];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = half ^ swap;
        const float4 four = *reinterpret_cast<const float4*>(staged + row * Tile::kStageRow + lane % kLanes * kChunk + 4 * at);
        values[4 * half] = four.x, values[4 * half + 1] = four.y, values[4 * half + 2] = four.z, values[4 * half + 3] = four.w;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float first = swap ? values[e + 4] : values[e], second = swap ? values[e] : values[e + 4];
        values[e] = first, values[e + 4] = second;
      }
      if (m >= p.m || column >= p.n) continue;
      const int64_t offset = static_cast<int64_t>(m) * p.n + column;
      T* out = static_cast<T*>(p.out) + offset;
      const T* base = static_cast<const T*>(p.base);
      Chunk<T> chunk;
      if (base && whole) chunk.words = *reinterpret_cast<const uint4*>(base + offset);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        float value = values[e] + bias[e];
        if (base) {
          if (!whole && column + e < p.n) chunk.values[e] = base[offset + e];
          value += Element<T>::to_float(chunk.values[e]);
        }
        chunk.values[e] = Element<T>::from_float(value);
      }
      if (whole) {
        *reinterpret_cast<uint4*>(out) = chunk.words;
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          if (column + e < p.n) out[e] = chunk.values[e];
        }
      }
    }
  }
}

// Tile (m, n) of a program: group_m rows of tiles at a time, so that neighbours share operands in L2.
__device__ __forceinline__ void rasterise(const GemmParams& p, int pid, int& tile_m, int& tile_n) {
  const int group = pid / (p.group_m * p.tiles_n), first = group * p.group_m;
  const int height = min(p.tiles_m - first, p.group_m), inside = pid % (p.group_m * p.tiles_n);
  tile_m = first + inside % height, tile_n = inside / height;
}

template <typename Tile>
__device__ __forceinline__ void gemm(const GemmParams& p) {
  extern __shared__ __align__(128) char shared[];
  int tile_m, tile_n;
  rasterise(p, blockIdx.x, tile_m, tile_n);
  const int m0 = tile_m * Tile::kM, n0 = tile_n * Tile::kN;
  const int first = (p.segments[0].depth + Tile::kDepth - 1) / Tile::kDepth;
  const int steps = first + (p.segments[1].depth + Tile::kDepth - 1) / Tile::kDepth;

  OperandStream<Tile> stream;
  stream.begin(p.segments[first == 0], m0, n0, p.m, p.n);
  const uint32_t base = shared_address(shared);
  const uint32_t place_a = base + OperandStream<Tile>::CopyA::place();
  const uint32_t place_b = base + Tile::A::kBytes + OperandStream<Tile>::CopyB::place();
  uint32_t write = 0;  // offset of the stage to fill next
  const auto prefetch = [&](int step) {
    if (step == first && first != 0 && step < steps) stream.begin(p.segments[1], m0, n0, p.m, p.n);
    if (step < steps) stream.next(place_a + write, place_b + write);
    commit_copies();
    write = write == (Tile::kStages - 1) * Tile::kStageBytes ? 0 : write + Tile::kStageBytes;
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) prefetch(step);

  const FragmentReader<Tile> reader;
  Accumulator<Tile> acc;
  Fragments<Tile> fragments[2];
  uint32_t read = base;
  wait_copies<Tile::kStages - 2>();
  __syncthreads();
  if (steps > 0) reader.read(fragments[0], read, 0);
  constexpr int kParts = Tile::kDepth / 16;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      if (k == kParts - 1) {
        read = read == base + (Tile::kStages - 1) * Tile::kStageBytes ? base : read + Tile::kStageBytes;
        wait_copies<Tile::kStages - 2>();
        __syncthreads();
      }
      if (k < kParts - 1 || step + 1 < steps) reader.read(fragments[(k + 1) % 2], read, (k + 1) % kParts);
      if (k == 0) prefetch(step + Tile::kStages - 1);
      acc.add(fragments[k % 2]);
    }
    if (step + 1 == first && p.seed) {
      const int warp = threadIdx.x / 32;
      const DropoutKey dropout(p.seed, p.threshold);
      acc.mask(dropout, p.keep_scale, m0 + warp / Tile::kWarpsN * Tile::kWarpM, n0 + warp % Tile::kWarpsN * Tile::kWarpN);
    }
  }
  wait_copies<0>();
  __syncthreads();
  store_output<Tile>(acc, p, shared, m0, n0);
}

}  // namespace loradash::gpu
