// Fingerprints of weights: which blocks of memory are summed on which thread, and the keys of this process.
#include <random>

#include "blocking.h"

namespace loradash::cpu {
namespace {

// Bytes of a block: with as many of keys it stays in L1.
constexpr int64_t kBlock = 8192;
// A task is 256 KB: some microseconds.
constexpr int64_t kBlocksPerTask = 32;

struct Keys {
  alignas(64) uint32_t words[(kBlock + kFingerprintLine) / sizeof(uint32_t)];

  Keys() {
    std::random_device random;
    std::seed_seq seed{random(), random(), random(), random(), random(), random(), random(), random()};
    std::mt19937 engine(seed);
    for (uint32_t& word : words) word = static_cast<uint32_t>(engine());
  }
};

int64_t blocks_of_run(const Runs& runs) { return ceil_div(runs.bytes, kBlock); }

}  // namespace

int64_t fingerprint_words(const Runs& runs) { return 2 * runs.count * blocks_of_run(runs); }

void fingerprint(const Runs& runs, uint64_t* out, const ThreadPool& pool) {
  static const Keys keys;
  const Kernels<float, float>& table = *kernels<float, float>();
  const int64_t per_run = blocks_of_run(runs), count = runs.count * per_run;
  parallel(pool, table, ceil_div(count, kBlocksPerTask), [&](int64_t task) {
    for (int64_t i = task * kBlocksPerTask; i < std::min(count, (task + 1) * kBlocksPerTask); ++i) {
      const int64_t begin = i % per_run * kBlock;
      table.fingerprint_block(static_cast<const char*>(runs.data) + i / per_run * runs.pitch + begin,
                              std::min(kBlock, runs.bytes - begin), reinterpret_cast<const char*>(keys.words),
                              out + 2 * i);
    }
  });
}

}  // namespace loradash::cpu
