// What the bindings of the CPU kernels share: conversions from Torch, and the cache of packed weights.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <compare>
#include <map>
#include <memory>
#include <mutex>

#include "problem.h"

namespace loradash {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "loradash CPU kernels take float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

inline ThreadPool thread_pool() {
  return {at::get_num_threads(), [](int64_t count, void (*body)(void*, int64_t), void* context) {
            at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

// The weights in the order the kernels read them. Copies of frozen ones are kept, one per direction, as long as the
// memory they were made from lives.
//
// A kept copy serves a call only after the whole weight was read in that call and its fingerprint (dash_linear.h) found
// to be the one taken before the copy was made. What wrote to the weight, through which tensor or library, and where,
// does not matter: a copy that differs from the weight is used with a probability of at most 2^-64. A write while a
// call runs is a race of the caller's, in this layer as in any other; the call after it sees it.
//
// Memory is known by its storage and the view's offset, sizes, strides and dtype, so that all tensors that view it the
// same way share the copy. It is packed to be kept when it is seen the second time: casts and dequantised weights, made
// for one call, never are.
class PackedWeights {
 public:
  // The packed weight (N, K) for a call on so many rows; undefined where the library had better read the weight itself.
  at::Tensor get(const at::Tensor& weight, Direction direction, int64_t rows);

  // Keep copies from now on, or drop all and keep none.
  void enable(bool on);
  // Drops the copies of the memory behind a weight, whichever view of it they were made from.
  void invalidate(const at::Tensor& weight);
  void clear();
  int64_t bytes();

 private:
  struct Copy {
    at::Tensor fingerprint, packed;
  };
  struct Key {
    const c10::StorageImpl* storage;
    int64_t offset, n, k, stride_n, stride_k;
    at::ScalarType dtype;

    explicit Key(const at::Tensor& weight);
    auto operator<=>(const Key&) const = default;
  };
  // A dead storage cannot be mistaken for a new one at its address: while `owner` is here, nothing else gets that.
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> owner;
    bool seen[2] = {};
    std::shared_ptr<const Copy> copies[2];
  };

  // Has this memory been seen in this direction before? And the copy, if there is one. From now on it has been.
  bool look_up(const Key& key, const at::Tensor& weight, Direction direction, std::shared_ptr<const Copy>& copy);
  void keep(const Key& key, Direction direction, std::shared_ptr<const Copy> copy);
  void drop_dead();

  std::mutex mutex_;  // of the entries; never held while memory is read or packed
  std::map<Key, Entry> entries_;
  std::atomic<bool> enabled_ = true;
};

PackedWeights& packed_weights();

// The fingerprint of a weight of which one stride is 1, int64.
at::Tensor fingerprint_of(const at::Tensor& weight);

}  // namespace loradash
