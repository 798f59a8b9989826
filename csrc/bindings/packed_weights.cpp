// The cache of packed weights: when a copy is made, kept, checked and dropped (see packed_weights.h).
#include "bindings/packed_weights.h"

#include <ATen/Functions.h>

#include <cstring>
#include <utility>

#include "bindings/cpu.h"

namespace loradash::cpu {
namespace {

Tensor pack(const Tensor& weight, Pass pass) {
  const DType dtype = dtype_of(weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  Tensor packed = at::empty({packed_bytes(dtype, pass, n, k)}, weight.options().dtype(at::kByte));
  pack_weight(dtype, pass, weight.const_data_ptr(), weight.stride(0), weight.stride(1), n, k, packed.mutable_data_ptr(),
              thread_pool());
  return packed;
}

Runs runs_of(const Tensor& weight) {
  const int64_t size = weight.element_size();
  if (weight.is_non_overlapping_and_dense()) return {weight.const_data_ptr(), 1, weight.numel() * size, 0};
  const int inner = weight.stride(1) == 1 ? 1 : 0;
  return {weight.const_data_ptr(), weight.size(1 - inner), weight.size(inner) * size, weight.stride(1 - inner) * size};
}

bool same(const Tensor& a, const Tensor& b) {
  return std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

// Packing moves N K elements: it is not worth that for one call on fewer rows.
constexpr int64_t kMinRowsToPack = 64;

}  // namespace

Tensor fingerprint_of(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && (weight.stride(0) == 1 || weight.stride(1) == 1), "no stride of 1");
  const Runs runs = runs_of(weight);
  Tensor words = at::empty({fingerprint_words(runs)}, weight.options().dtype(at::kLong));
  fingerprint(runs, reinterpret_cast<uint64_t*>(words.mutable_data_ptr<int64_t>()), thread_pool());
  return words;
}

PackedWeights& packed_weights() {
  // It is never destroyed: tensors may outlive static destructors.
  static PackedWeights* weights = new PackedWeights;
  return *weights;
}

PackedWeights::Key::Key(const Tensor& weight)
    : storage(weight.storage().unsafeGetStorageImpl()),
      offset(weight.storage_offset()),
      n(weight.size(0)),
      k(weight.size(1)),
      stride_n(weight.stride(0)),
      stride_k(weight.stride(1)),
      dtype(weight.scalar_type()) {}

Tensor PackedWeights::get(const Tensor& weight, Pass pass, int64_t rows) {
  if (!enabled_ || weight.requires_grad() || weight.numel() == 0)
    return rows < kMinRowsToPack ? Tensor() : pack(weight, pass);
  const Key key(weight);
  std::shared_ptr<const Copy> copy;
  if (!look_up(key, weight, pass, copy)) return pack(weight, pass);
  Tensor now = fingerprint_of(weight);
  if (!copy || !same(copy->fingerprint, now)) {
    // The weight is packed after it was fingerprinted: the next call finds a write in between.
    copy = std::make_shared<const Copy>(Copy{std::move(now), pack(weight, pass)});
    keep(key, pass, copy);
  }
  return copy->packed;
}

bool PackedWeights::look_up(const Key& key, const Tensor& weight, Pass pass, std::shared_ptr<const Copy>& copy) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = entries_.find(key);
  if (it == entries_.end()) {
    drop_dead();
    it = entries_.emplace(key, Entry{weight.storage().getWeakStorageImpl()}).first;
  }
  bool& seen = it->second.seen[static_cast<int>(pass)];
  copy = it->second.copies[static_cast<int>(pass)];
  return std::exchange(seen, true);
}

void PackedWeights::keep(const Key& key, Pass pass, std::shared_ptr<const Copy> copy) {
  std::lock_guard<std::mutex> lock(mutex_);
  // The entry is gone where it was dropped meanwhile.
  const auto it = entries_.find(key);
  if (it != entries_.end()) it->second.copies[static_cast<int>(pass)] = std::move(copy);
}

void PackedWeights::enable(bool on) {
  enabled_ = on;
  if (!on) clear();
}

void PackedWeights::invalidate(const Tensor& weight) {
  const c10::StorageImpl* storage = weight.storage().unsafeGetStorageImpl();
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(entries_, [&](const auto& item) { return item.first.storage == storage; });
}

void PackedWeights::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.clear();
}

int64_t PackedWeights::bytes() {
  std::lock_guard<std::mutex> lock(mutex_);
  drop_dead();
  int64_t total = 0;
  for (const auto& [key, entry] : entries_)
    for (const auto& copy : entry.copies) total += copy ? static_cast<int64_t>(copy->packed.nbytes()) : 0;
  return total;
}

// Drops the copies of storages that are gone or were emptied: sharded weights are gathered into the same storage, call
// after call. The weak reference keeps the object itself; a strong one, taken here, might be the last and run the
// owner's deleter.
void PackedWeights::drop_dead() {
  std::erase_if(entries_,
                [](const auto& item) { return item.second.owner.expired() || item.first.storage->nbytes() == 0; });
}

}  // namespace loradash::cpu
