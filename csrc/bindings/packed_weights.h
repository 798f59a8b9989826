// The cache of packed weights of the CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <compare>
#include <map>
#include <memory>
#include <mutex>

#include "problem.h"

namespace loradash::cpu {

using at::Tensor;

// Gives the weights in the order the kernels read them. Copies of frozen ones are kept, one per pass, as long as the
// memory they were made from lives.
//
// A kept copy serves a call only after the whole weight was read in that call and its fingerprint (cpu/cpu.h) found
// to be the one taken before the copy was made. What wrote to the weight, through which tensor or library, and where,
// does not matter: a copy that differs from the weight is used with a probability of at most 2^-64. A write while a
// call runs is a race of the caller's, in this layer as in any other; the call after it sees it.
//
// Memory is known by its storage and the view's offset, sizes, strides and dtype, so that all tensors that view it the
// same way share the copy. It is packed to be kept when it is seen the second time: casts and dequantised weights, made
// for one call, never are.
class PackedWeights {
 public:
  // Returns the packed weight (N, K) for a call on so many rows; undefined where the library had better read the weight
  // itself.
  Tensor get(const Tensor& weight, Pass pass, int64_t rows);

  // Keeps copies from now on, or drops all and keeps none.
  void enable(bool on);
  // Drops the copies of the memory behind a weight, whichever view of it they were made from.
  void invalidate(const Tensor& weight);
  void clear();
  int64_t bytes();

 private:
  struct Copy {
    Tensor fingerprint, packed;
  };
  struct Key {
    const c10::StorageImpl* storage;
    int64_t offset, n, k, stride_n, stride_k;
    at::ScalarType dtype;

    explicit Key(const Tensor& weight);
    auto operator<=>(const Key&) const = default;
  };
  // A dead storage cannot be mistaken for a new one at its address: while `owner` is here, nothing else gets that.
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> owner;
    bool seen[2] = {};
    std::shared_ptr<const Copy> copies[2];
  };

  // Tells whether this memory has been seen in this pass before, and from now on it has been; `copy` becomes the kept
  // one, or null.
  bool look_up(const Key& key, const Tensor& weight, Pass pass, std::shared_ptr<const Copy>& copy);
  void keep(const Key& key, Pass pass, std::shared_ptr<const Copy> copy);
  void drop_dead();

  // Guards the entries, and is never held while memory is read or packed.
  std::mutex mutex_;
  std::map<Key, Entry> entries_;
  std::atomic<bool> enabled_ = true;
};

PackedWeights& packed_weights();

// Returns the fingerprint, int64, of a weight of which one stride is 1.
Tensor fingerprint_of(const Tensor& weight);

}  // namespace loradash::cpu
