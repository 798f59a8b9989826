// One GEMM for the forward product and for dx: C = A0 B0 + A1 B1, the K loop running on from the first pair of operands
// into the second without a break in the pipeline.
//
//   forward: [x | T] [W | Q]^T, bias in the epilogue.    dx: (T D, masked in registers) + dy W.
//
// 2 m n (depth0 + depth1) FLOPs, both depths padded to kDepth; reads A and B once as far as L2 holds a group of tiles,
// writes C once. A multistage pipeline in the manner of CUTLASS's sm_80 main loop: kStages - 1 tiles in flight by
// cp.async, fragments of the next 16 columns loaded while the tensor cores multiply these.
#pragma once

#include "cuda/params.h"
#include "cuda/tiles.h"
#include "philox.cuh"
#include "shared.cuh"

namespace loradash::cuda {

// With kColumns B is stored (depth, n), its rows along n; else (n, depth), its rows along the depth.
template <typename T, int kM_, int kN_, int kDepth_, int kWarpsM_, int kWarpsN_, int kStages_, bool kColumns_,
          bool kAligned_>
struct GemmTile {
  using Type = T;
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr bool kColumns = kColumns_, kAligned = kAligned_;
  static constexpr int kThreads = gemm_threads(kWarpsM, kWarpsN);
  // The part of C that a warp computes.
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  using A = SharedTile<kM, kDepth>;
  using B = std::conditional_t<kColumns, SharedTile<kDepth, kN>, SharedTile<kN, kDepth>>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  // Floats of a row of staged results: eight more keep rows in different banks.
  static constexpr int kStageRow = kWarpN + 8;
  static constexpr int kSharedBytes = gemm_shared_bytes(kM, kN, kDepth, kStages);
  static_assert(kStages * kStageBytes == kSharedBytes);
  static_assert(kWarpsM * kWarpsN * 16 * kStageRow * 4 <= kSharedBytes, "results are staged where the operands were");
};

// Where the next tile of both operands comes from; each thread knows its own first elements.
template <typename Tile>
struct OperandStream {
  using T = typename Tile::Type;
  using CopyA = TileCopy<T, typename Tile::A, Tile::kThreads, Tile::kAligned>;
  using CopyB = TileCopy<T, typename Tile::B, Tile::kThreads, Tile::kAligned>;
  const T *a, *b;
  // Steps are in bytes, the others in elements.
  int64_t lda, ldb, step_a, step_b, next_b;
  int rows_left, columns_left, depth_left;
  // No row or column of these tiles is outside.
  bool whole;

  __device__ __forceinline__ void begin(const Segment& s, int m0, int n0, int m, int n) {
    lda = s.lda, ldb = s.ldb, depth_left = s.depth;
    step_a = CopyA::kStep * lda * sizeof(T), step_b = CopyB::kStep * ldb * sizeof(T);
    next_b = Tile::kColumns ? Tile::kDepth * ldb : Tile::kDepth;
    rows_left = m - m0, columns_left = n - n0;
    whole = Tile::kAligned && rows_left >= Tile::kM && columns_left >= Tile::kN;
    a = static_cast<const T*>(s.a) + (m0 + CopyA::row()) * lda + CopyA::column();
    b = static_cast<const T*>(s.b);
    b += Tile::kColumns ? CopyB::row() * ldb + n0 + CopyB::column() : (n0 + CopyB::row()) * ldb + CopyB::column();
    pin(step_a), pin(step_b), pin(next_b);
  }

  __device__ __forceinline__ void next(uint32_t to_a, uint32_t to_b) {
    if (whole && depth_left >= Tile::kDepth) {
      CopyA::load_whole(to_a, a, step_a);
      CopyB::load_whole(to_b, b, step_b);
    } else {
      CopyA::load(to_a, a, lda, rows_left, depth_left);
      if constexpr (Tile::kColumns)
        CopyB::load(to_b, b, ldb, depth_left, columns_left);
      else
        CopyB::load(to_b, b, ldb, columns_left, depth_left);
    }
    a += Tile::kDepth, b += next_b;
    depth_left -= Tile::kDepth;
  }
};

// What a warp multiplies next: 16 columns of its rows of A and B, read by ldmatrix.
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
    for (uint32_t& offset : a) pin(offset);
    for (uint32_t& offset : b) pin(offset);
  }

  // Sixteen rows further down lies the same swizzle: a constant offset.
  template <int kPart, int kRow>
  __device__ __forceinline__ void read_a(uint32_t (&f)[4], uint32_t stage) const {
    load_matrices<false, kRow * 16 * Tile::A::kRowBytes>(f, stage + a[kPart]);
  }
  // Reads two fragments: sixteen columns of C.
  template <int kPart, int kPair>
  __device__ __forceinline__ void read_b(uint32_t (&f)[4], uint32_t stage) const {
    if constexpr (Tile::kColumns) {
      load_matrices<true, kPart * 16 * Tile::B::kRowBytes>(f, stage + b[kPair]);
    } else {
      load_matrices<false, kPair * 16 * Tile::B::kRowBytes>(f, stage + b[kPart]);
    }
  }
  template <int kPart>
  __device__ __forceinline__ void read(Fragments<Tile>& f, uint32_t stage) const {
    unrolled<Tile::kFragmentsM>([&](auto i) { read_a<kPart, i>(f.a[i], stage); });
    unrolled<Tile::kFragmentsN / 2>([&](auto j) { read_b<kPart, j>(f.b[j], stage); });
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
      for (int j = 0; j < Tile::kFragmentsN; ++j)
        Element<typename Tile::Type>::mma(c[i][j], f.a[i], &f.b[j / 2][j % 2 * 2]);
    }
  }

  // Zeroes what dropout drops of C at (m0, n0), scales the rest.
  __device__ __forceinline__ void mask(const Dropout16& dropout, float scale, int m0, int n0) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; j += 2) {
      const PhiloxColumn column = masked_column(dropout, n0 + 8 * j);
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) mask_pair(c[i][j], c[i][j + 1], dropout, column, scale, m0 + 16 * i);
    }
  }

  // Masks a product of depth 32, which lies in one stage, and adds it: for when C is not zero any more. It takes
  // sixteen rows at a time and reads the columns again for each: C leaves few registers.
  __device__ __forceinline__ void add_masked(const FragmentReader<Tile>& reader, uint32_t stage,
                                             const Dropout16& dropout, float scale, int m0, int n0) {
    unrolled<Tile::kFragmentsM>([&](auto i) {
      uint32_t a[2][4];
      reader.template read_a<0, i>(a[0], stage);
      reader.template read_a<1, i>(a[1], stage);
      unrolled<Tile::kFragmentsN / 2>([&](auto pair) {
        float low[2][4] = {};
        uint32_t b[4];
        reader.template read_b<0, pair>(b, stage);
        Element<typename Tile::Type>::mma(low[0], a[0], b);
        Element<typename Tile::Type>::mma(low[1], a[0], b + 2);
        reader.template read_b<1, pair>(b, stage);
        Element<typename Tile::Type>::mma(low[0], a[1], b);
        Element<typename Tile::Type>::mma(low[1], a[1], b + 2);
        if (dropout.active)
          mask_pair(low[0], low[1], dropout, masked_column(dropout, n0 + 16 * pair), scale, m0 + 16 * i);
#pragma unroll
        for (int e = 0; e < 8; ++e) c[i][2 * pair + e / 4][e % 4] += low[e / 4][e % 4];
      });
    });
  }

 private:
  static __device__ __forceinline__ PhiloxColumn masked_column(const Dropout16& dropout, int n0) {
    return dropout.column(n0 / kChunk + threadIdx.x % 4 / 2);
  }

  // Two fragments, 16 x 16, have 32 blocks of eight neighbours: each lane draws one, for four lanes to choose their
  // elements from.
  static __device__ __forceinline__ void mask_pair(float (&left)[4], float (&right)[4], const Dropout16& dropout,
                                                   const PhiloxColumn& column, float scale, int m0) {
    const int lane = threadIdx.x % 32, part = lane % 4;
    const uint4 drawn = dropout.masks(dropout.row(m0 + lane / 4 + part % 2 * 8), column);
    // These are bits 8 part to 8 part + 7 of a word that the four lanes of a row put together.
    uint32_t bits =
        (drawn.x & 0x00020001u) | (drawn.y & 0x00080004u) | (drawn.z & 0x00200010u) | (drawn.w & 0x00800040u);
    bits = ((bits | bits >> 16) & 0xFF) << (8 * part);
    bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 1);
    bits |= __shfl_xor_sync(0xFFFFFFFFu, bits, 2);
#pragma unroll
    // Element e is in column 2 part + e % 2, eight rows further down from element 2 on.
    for (int e = 0; e < 8; ++e) {
      float& value = e < 4 ? left[e % 4] : right[e % 4];
      const int bit = 16 * (e / 4) + 8 * (e % 4 / 2) + 2 * part + e % 2;
      value = (bits >> bit) & 1 ? value * scale : 0.0f;
    }
  }
};

template <typename T>
__device__ __forceinline__ void add_base(float (&values)[kChunk], const T* base, bool whole, int left) {
  Chunk<T> chunk;
  if (whole) chunk.words = *reinterpret_cast<const uint4*>(base);
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    if (!whole && e < left) chunk.values[e] = base[e];
    values[e] += Element<T>::to_float(chunk.values[e]);
  }
}

// Rounds C once, after bias and base: rows of fp32 go through shared memory, so that a lane stores 16 bytes of a row.
template <typename Tile>
__device__ __forceinline__ void store_output(const Accumulator<Tile>& acc, const GemmParams& p, char* shared, int m0,
                                             int n0) {
  using T = typename Tile::Type;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* staged = reinterpret_cast<float*>(shared) + warp * 16 * Tile::kStageRow;
  m0 += warp / Tile::kWarpsN * Tile::kWarpM, n0 += warp % Tile::kWarpsN * Tile::kWarpN;
  // So many lanes store a row, so many rows at a time.
  constexpr int kLanes = Tile::kWarpN / kChunk, kRows = 32 / kLanes;
  // The first four of every eight columns are staged first, then the others: a lane then reads both halves of its eight
  // beside those of its neighbours.
  constexpr int kHalf = Tile::kStageRow / 2;
  const int column = n0 + lane % kLanes * kChunk, rows = p.m, columns = p.n;
  const bool whole = p.whole;
  const T* const base = static_cast<const T*>(p.base);
  T* const output = static_cast<T*>(p.out);
  float bias[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    const bool inside = p.bias && column + e < columns;
    bias[e] = inside ? Element<T>::to_float(static_cast<const T*>(p.bias)[column + e]) : 0.0f;
  }
  float* const write = staged + lane / 4 * Tile::kStageRow + lane % 4 / 2 * kHalf + lane % 2 * 2;
  const float* const read = staged + lane / kLanes * Tile::kStageRow + lane % kLanes * 4;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      *reinterpret_cast<float2*>(write + 4 * j) = make_float2(acc.c[i][j][0], acc.c[i][j][1]);
      *reinterpret_cast<float2*>(write + 8 * Tile::kStageRow + 4 * j) = make_float2(acc.c[i][j][2], acc.c[i][j][3]);
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 16; r += kRows) {
      const int m = m0 + 16 * i + r + lane / kLanes;
      if (m >= rows || column >= columns) continue;
      const float4 low = *reinterpret_cast<const float4*>(read + r * Tile::kStageRow);
      const float4 high = *reinterpret_cast<const float4*>(read + r * Tile::kStageRow + kHalf);
      float values[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int e = 0; e < kChunk; ++e) values[e] += bias[e];
      const int64_t offset = static_cast<int64_t>(m) * columns + column;
      if (base) add_base(values, base + offset, whole, columns - column);
      if (whole) {
        uint4 packed;
        packed.x = Element<T>::pack(values[0], values[1]), packed.y = Element<T>::pack(values[2], values[3]);
        packed.z = Element<T>::pack(values[4], values[5]), packed.w = Element<T>::pack(values[6], values[7]);
        *reinterpret_cast<uint4*>(output + offset) = packed;
      } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          if (column + e < columns) output[offset + e] = Element<T>::from_float(values[e]);
        }
      }
    }
  }
}

// Finds the tile (m, n) of a program: group_m rows of tiles at a time, so that neighbours share operands in L2.
__device__ __forceinline__ void rasterise(const GemmParams& p, int pid, int& tile_m, int& tile_n) {
  const int group = pid / (p.group_m * p.tiles_n), first = group * p.group_m;
  const int height = min(p.tiles_m - first, p.group_m), inside = pid % (p.group_m * p.tiles_n);
  tile_m = first + inside % height, tile_n = inside / height;
}

// What becomes of the second pair of operands.
enum class Second {
  // The K loop goes on; a mask, if any, falls on what the first pair gave (in dx the low-rank term comes first).
  kGoesOn,
  // The K loop goes on, and there is no mask.
  kGoesOnBare,
  // It is a product of its own, masked and added: the low-rank term of dx where it is late.
  kMasked,
};

// Computes one tile of C, at (m0, n0). `before_second` is called by all threads before the first copy of the second
// pair of operands.
template <typename Tile, Second kSecond, typename Before>
__device__ __forceinline__ void multiply(const GemmParams& p, char* shared, int m0, int n0,
                                         const Before& before_second) {
  const int first = (p.segments[0].depth + Tile::kDepth - 1) / Tile::kDepth;
  const int second = (p.segments[1].depth + Tile::kDepth - 1) / Tile::kDepth;
  const int steps = kSecond == Second::kMasked ? first : first + second;
  const auto warp_m0 = [&] { return m0 + static_cast<int>(threadIdx.x) / 32 / Tile::kWarpsN * Tile::kWarpM; };
  const auto warp_n0 = [&] { return n0 + static_cast<int>(threadIdx.x) / 32 % Tile::kWarpsN * Tile::kWarpN; };

  OperandStream<Tile> stream;
  stream.begin(p.segments[kSecond != Second::kMasked && first == 0], m0, n0, p.m, p.n);
  const uint32_t base = shared_address(shared);
  const uint32_t place_a = base + OperandStream<Tile>::CopyA::place();
  const uint32_t place_b = base + Tile::A::kBytes + OperandStream<Tile>::CopyB::place();
  constexpr uint32_t kEnd = Tile::kStages * Tile::kStageBytes;
  // The offset of the stage to fill next, and how many tiles are fetched before the second pair of operands.
  uint32_t write = 0;
  int to_fetch = steps;
  const auto prefetch = [&] {
    if (to_fetch > 0) {
      if constexpr (kSecond != Second::kMasked) {
        if (to_fetch == second) {
          // Makes this a branch that is taken once, not a selection in every step.
          asm volatile("");
          before_second();
          stream.begin(p.segments[1], m0, n0, p.m, p.n);
        }
      }
      stream.next(place_a + write, place_b + write);
      --to_fetch;
    }
    commit_copies();
    write += Tile::kStageBytes;
    if (write == kEnd) write = 0;
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) prefetch();

  const FragmentReader<Tile> reader;
  Accumulator<Tile> acc;
  Fragments<Tile> fragments[2];
  uint32_t read = base;
  wait_copies<Tile::kStages - 2>();
  __syncthreads();
  if (steps > 0) reader.template read<0>(fragments[0], read);
  constexpr int kParts = Tile::kDepth / 16;
  static_assert(kParts % 2 == 0, "fragments take turns");
  for (int step = 0; step < steps; ++step) {
    unrolled<kParts>([&](auto part) {
      if constexpr (part == kParts - 1) {
        read += Tile::kStageBytes;
        if (read == base + kEnd) read = base;
        wait_copies<Tile::kStages - 2>();
        __syncthreads();
        if (step + 1 < steps) reader.template read<0>(fragments[0], read);
      } else {
        reader.template read<part + 1>(fragments[(part + 1) % 2], read);
      }
      if constexpr (part == 0) prefetch();
      acc.add(fragments[part % 2]);
    });
    if (kSecond == Second::kGoesOn && step + 1 == first && p.seed) {
      acc.mask(Dropout16(p), p.keep_scale, warp_m0(), warp_n0());
    }
  }
  if constexpr (kSecond == Second::kMasked) {
    static_assert(kParts == 2);
    before_second();
    stream.begin(p.segments[1], m0, n0, p.m, p.n);
    const Dropout16 dropout(p);
    for (int step = 0; step < second; ++step) {
      wait_copies<0>();
      __syncthreads();
      stream.next(place_a, place_b);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      acc.add_masked(reader, base, dropout, p.keep_scale, warp_m0(), warp_n0());
    }
  }
  wait_copies<0>();
  __syncthreads();
  store_output<Tile>(acc, p, shared, m0, n0);
}

template <typename Tile>
__device__ __forceinline__ void gemm(const GemmParams& p) {
  extern __shared__ __align__(256) char shared[];
  int tile_m, tile_n;
  rasterise(p, blockIdx.x, tile_m, tile_n);
  multiply<Tile, Second::kGoesOn>(p, shared, tile_m * Tile::kM, tile_n * Tile::kN, [] {});
}

}  // namespace loradash::cuda
