// Tiles in shared memory: asynchronous copies into them, swizzled so that neither the copies nor ldmatrix meet bank
// conflicts.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "element.cuh"

namespace loradash::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Keeps a value in its register: recomputing it inside the main loop costs more than it saves.
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin(int64_t& value) { asm volatile("" : "+l"(value)); }

// Calls f(0), ..., f(kCount - 1) with constants: offsets that are constants become part of an instruction.
template <int kValue>
struct Index {
  __host__ __device__ constexpr operator int() const { return kValue; }
};
template <typename F, int... kIndex>
__device__ __forceinline__ void unrolled(const F& f, std::integer_sequence<int, kIndex...>) {
  (f(Index<kIndex>{}), ...);
}
template <int kCount, typename F>
__device__ __forceinline__ void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, kCount>{});
}

// Copies 16 bytes; where not `inside`, it reads nothing and writes zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}
template <int kOffset>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16;\n" ::"r"(to), "l"(from), "n"(kOffset));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void store_shared(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0 + %5], {%1,%2,%3,%4};\n" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
               "n"(kOffset)
               : "memory");
}
template <int kOffset = 0>
__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4 + %5];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from), "n"(kOffset)
               : "memory");
  return v;
}

// Loads four 8 x 8 matrices; kTransposed gives each lane elements of a column.
template <bool kTransposed, int kOffset = 0>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4 + %5];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from), "n"(kOffset)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4 + %5];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from), "n"(kOffset)
                 : "memory");
  }
}

// Loads two matrices, transposed; the addresses of the first sixteen lanes count.
template <int kOffset>
__device__ __forceinline__ void load_two_matrices(uint32_t (&r)[2], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2 + %3];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(from), "n"(kOffset)
               : "memory");
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile of kRows x kColumns 16-bit elements. Eight chunks span all
// banks: the eight rows that ldmatrix reads at one column must lie in eight different ones.
template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kChunks = kColumns / kChunk;
  static constexpr int kRowBytes = kColumns * kElementBytes, kBytes = kRows * kRowBytes;
  static_assert(kChunks == 4 || kChunks % 8 == 0, "rows of 64 bytes or of whole 128-byte lines");

  // Rows of 64 bytes share a line in pairs, so that only every second row needs another place.
  static __device__ __forceinline__ int swizzle(int row) { return kChunks == 4 ? (row >> 1) & 3 : row & 7; }
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ swizzle(row))) * kChunkBytes;
  }
};

// A thread's part of copying tiles [rows][columns] out of a matrix of row stride ld. It takes the same chunks each
// time: rows `row() + i * kStep` of one column of chunks.
template <typename T, typename Tile, int kThreads, bool kAligned>
struct TileCopy {
  // Rows between a thread's chunks.
  static constexpr int kStep = kThreads / Tile::kChunks;
  static constexpr int kCount = Tile::kRows / kStep;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kStep == 0 && kStep % 8 == 0);

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / Tile::kChunks; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % Tile::kChunks * kChunk; }
  static __device__ __forceinline__ int place() { return Tile::offset(row(), column() / kChunk); }

  // `from` is the thread's own first element; rows_left and columns_left count from the tile's corner to the matrix's
  // end. Where kAligned, 16-byte rows of whole chunks are copied asynchronously; else copies go element by element and
  // are there when the next barrier is passed.
  static __device__ __forceinline__ void load(uint32_t tile, const T* from, int64_t ld, int rows_left,
                                              int columns_left) {
    // Element by element there is little to gain by unrolling, and registers are short.
#pragma unroll(kAligned ? kCount : 1)
    for (int i = 0; i < kCount; ++i) {
      const uint32_t to = tile + i * kStep * Tile::kRowBytes;
      const bool row_inside = row() + i * kStep < rows_left;
      if constexpr (kAligned) {
        copy_async(to, from + i * kStep * ld, row_inside && column() < columns_left);
      } else {
        Chunk<T> chunk;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (row_inside && column() + j < columns_left) chunk.values[j] = from[i * kStep * ld + j];
        }
        store_shared(to, chunk.words);
      }
    }
  }

  // Does the same where all of the tile is inside an aligned matrix; `step` is kStep rows in bytes.
  static __device__ __forceinline__ void load_whole(uint32_t tile, const T* from, int64_t step) {
    const char* row = reinterpret_cast<const char*>(from);
    unrolled<kCount>([&](auto i) {
      copy_async<i * kStep * Tile::kRowBytes>(tile, row);
      row += step;
    });
  }
};

}  // namespace loradash::cuda
