// What the kernels and the plan share: every tile and every pass that is compiled, and the threads and the bytes of
// shared memory that each takes. The .cu files instantiate these lists, and the plan chooses from them.
#pragma once

#include "problem.h"

namespace loradash::cuda {

// Eight neighbouring elements, 16 bytes: the unit of every copy, and of one Philox call.
constexpr int kChunk = 8, kChunkBytes = 16;
static_assert(kChunk == kPhiloxElements);
// An element of x takes so many bytes: bf16 or fp16.
constexpr int kElementBytes = 2;

// A product keeps `stages` tiles of both operands in flight.
constexpr int gemm_shared_bytes(int m, int n, int depth, int stages) {
  return stages * (m + n) * depth * kElementBytes;
}
constexpr int gemm_threads(int warps_m, int warps_n) { return 32 * warps_m * warps_n; }
// A tile of two stages serves products that are no deeper. A processor is to hold so many of its programs, which bounds
// their registers; 0 leaves them to the compiler.
constexpr int kShallowStages = 2;
constexpr int gemm_resident(int stages) { return stages == kShallowStages ? 3 : 0; }

// A processor holds this many programs of the one launch: it bounds their registers, and the grid has no more.
constexpr int kOneLaunchResident = 2;

// A pass streams X through shared memory in tiles of this size.
constexpr int kPassRows = 64, kPassColumns = 128, kPassStages = 3, kPassThreads = 128;

// The tensor cores multiply by eight ranks at a time. They are one chunk of a row of the right operand.
constexpr int kFragmentRanks = 8;
static_assert(kFragmentRanks == kChunk);

// Partial sums of a pass that projects are added here: one a thread. `last` says whether this program arrived last.
struct alignas(kChunkBytes) PassScratch {
  float sums[kPassThreads];
  bool last;
};

// What one pass does: fragments of ranks that X is projected on and reduced with (0: none), and how many blocks of 128
// columns a program reduces (a projection alone takes any number). The methods lay out its shared memory.
struct PassKind {
  int project, reduce, blocks;

  // A program projects on `projected` ranks and reduces with `reduced`; the next group of ranks begins `ranks` further.
  constexpr int projected() const { return kFragmentRanks * project; }
  constexpr int reduced() const { return kFragmentRanks * reduce; }
  constexpr int ranks() const { return project > reduce ? projected() : reduced(); }
  // Registers are bounded for this many programs on a processor; its shared memory may allow fewer.
  constexpr int resident() const { return factor_stays() ? 1 : 3; }

  // The factor F stays while the rows stream by where there is a reduction; else it streams along.
  constexpr bool factor_stays() const { return project > 0 && reduce > 0; }
  constexpr int factor_bytes() const { return projected() * kPassColumns * kElementBytes; }
  constexpr int stage_bytes() const {
    return kPassRows * kPassColumns * kElementBytes + (factor_stays() ? 0 : factor_bytes());
  }
  // A row of the right operand is an odd number of chunks: rows begin in different banks.
  constexpr int right_pitch() const { return (reduce | 1) * kChunkBytes; }
  constexpr int right_bytes() const { return reduce ? kPassRows * right_pitch() : 0; }
  constexpr int right_at() const { return kPassStages * stage_bytes(); }
  constexpr int factor_at() const { return right_at() + kPassStages * right_bytes(); }
  constexpr int scratch_at() const { return factor_at() + (factor_stays() ? blocks * factor_bytes() : 0); }
  constexpr int shared_bytes() const { return scratch_at() + (project ? static_cast<int>(sizeof(PassScratch)) : 0); }
};

// The passes that share a launch with a product: over x in the forward pass, over dy in dx.
constexpr PassKind kOneLaunchX{4, 0, 1}, kOneLaunchDy{4, 3, 2};

// Packing and the second stage of sums.
constexpr int kSmallThreads = 256;

}  // namespace loradash::cuda

// Products: name suffix; rows, columns, depth of a tile; warps along rows and columns; stages of the pipeline.
// Aligned: 16-byte rows. The last serves what is not ("any"). A call without W has rank columns alone: there is no K
// loop to keep full, its programs write, and the shallow tile lets a processor hold most of them.
#define LORADASH_GEMM_TILES(GEMM)                  \
  GEMM(128x256, 128, 256, 32, 2, 4, 4, true)       \
  GEMM(128x128, 128, 128, 32, 2, 2, 3, true)       \
  GEMM(64x128, 64, 128, 32, 2, 2, 4, true)         \
  GEMM(64x64, 64, 64, 32, 2, 2, 4, true)           \
  GEMM(64x128_shallow, 64, 128, 32, 2, 2, 2, true) \
  GEMM(64x64_any, 64, 64, 32, 2, 2, 3, false)

// The forward product or dx in one launch, whose programs also run the pass over x or dy, of four warps.
#define LORADASH_ONE_LAUNCH_TILES(ONE)           \
  ONE(one_launch_128x128, 128, 128, 32, 2, 2, 3) \
  ONE(one_launch_64x128, 64, 128, 32, 2, 2, 4)

// The lists name passes and give the fields of their PassKind. Down runs over x in the forward pass, Dy and X in the
// backward pass.
#define LORADASH_DOWN_PASSES(PASS) \
  PASS(down_32, 4, 0, 1)           \
  PASS(down_64, 8, 0, 1)
#define LORADASH_DY_PASSES(PASS) \
  PASS(dy_32_24, 4, 3, 4)        \
  PASS(dy_32_32, 4, 4, 2)        \
  PASS(dy_64_64, 8, 8, 1)
#define LORADASH_X_PASSES(PASS) \
  PASS(x_16, 0, 2, 1)           \
  PASS(x_32, 0, 4, 1)           \
  PASS(x_64, 0, 8, 1)
