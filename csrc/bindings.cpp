// Torch's side of the CPU kernels: tensors to pointers, the library's base product where ours is not the faster one,
// and the cache of packed weights. Schemas of the public operators are in Python; these are their CPU backend.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <unordered_map>

#include "dash_linear.h"

namespace loradash {
namespace gpu {
void define_gpu(pybind11::module_& m);  // bindings_gpu.cpp
}
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- conversions -----------------------------------------------------------------------------------------------------

DType dtype_of(const Tensor& t) {
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

ThreadPool thread_pool() {
  return {at::get_num_threads(), [](int64_t count, void (*body)(void*, int64_t), void* context) {
            at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

// Rows of unit stride; the distance between rows is free.
Tensor unit_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous(); }

Tensor fp32(const OptionalTensor& t) { return t ? t->to(at::kFloat).contiguous() : Tensor(); }

const float* float_data(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
float* float_out(const OptionalTensor& t) { return t ? t->mutable_data_ptr<float>() : nullptr; }

// fp32 copies of the adapters where they are not fp32 already; holds them for the length of a call.
struct AdapterTensors {
  Tensor a, b, u, vt, sigma;
  Adapters params;

  AdapterTensors(const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& dash_u,
                 const OptionalTensor& dash_vt, const OptionalTensor& dash_sigma, double scaling)
      : a(fp32(lora_a)), b(fp32(lora_b)), u(fp32(dash_u)), vt(fp32(dash_vt)), sigma(fp32(dash_sigma)) {
    params = {float_data(a),
              float_data(b),
              float_data(u),
              float_data(vt),
              float_data(sigma),
              lora_a.size(0),
              u.defined() ? u.size(1) : 0,
              static_cast<float>(scaling)};
  }
};

Dropout dropout_of(const OptionalTensor& seed, int64_t threshold) {
  if (!seed || threshold == 0) return {};
  const int64_t* words = seed->const_data_ptr<int64_t>();
  return {static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), static_cast<uint32_t>(threshold)};
}

// --- packed weights --------------------------------------------------------------------------------------------------

// A frozen weight is packed once per direction and kept as long as the weight lives. The entry is dropped when the
// tensor dies, moves, is written to (version counter), or when a sample of its elements has changed: writes through
// `.data` do not bump the version.
class PackedWeights {
 public:
  // A packed copy, from the cache where the weight may be kept there, else made for this call.
  Tensor get(const Tensor& weight, Direction direction) {
    if (!cacheable(weight)) return pack(weight, direction);
    std::lock_guard<std::mutex> lock(mutex_);
    auto [it, fresh] = entries_.try_emplace(weight.unsafeGetTensorImpl(), weight);
    if (fresh) {
      drop_dead();
    } else if (!it->second.matches(weight)) {
      it->second = Entry(weight);
    }
    Tensor& packed = it->second.packed[static_cast<int>(direction)];
    if (!packed.defined()) packed = pack(weight, direction);
    return packed;
  }

  bool cacheable(const Tensor& weight) const {
    return enabled_ && !weight.requires_grad() && !weight.is_inference() && weight.numel() > 0;
  }
  void enable(bool on) {
    std::lock_guard<std::mutex> lock(mutex_);
    enabled_ = on;
    if (!on) entries_.clear();
  }
  int64_t bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    drop_dead();
    int64_t total = 0;
    for (const auto& [key, entry] : entries_)
      for (const Tensor& t : entry.packed) total += t.defined() ? static_cast<int64_t>(t.nbytes()) : 0;
    return total;
  }

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::TensorImpl> owner;
    const void* data;
    int64_t version;
    uint64_t sample;
    Tensor packed[2];

    explicit Entry(const Tensor& weight)
        : owner(weight.getIntrusivePtr()),
          data(weight.const_data_ptr()),
          version(weight._version()),
          sample(hash(weight)) {}

    bool matches(const Tensor& weight) const {
      return !owner.expired() && data == weight.const_data_ptr() &&
             version == static_cast<int64_t>(weight._version()) && sample == hash(weight);
    }

    // FNV-1a over 32 elements spread over the storage.
    static uint64_t hash(const Tensor& weight) {
      constexpr int64_t kSamples = 32;
      const char* data = static_cast<const char*>(weight.const_data_ptr());
      const int64_t size = weight.element_size(), count = weight.numel();
      uint64_t h = 14695981039346656037ull;
      for (int64_t i = 0; i < kSamples; ++i) {
        uint32_t element = 0;
        std::memcpy(&element, data + (count - 1) * i / (kSamples - 1) * size, size);
        h = (h ^ element) * 1099511628211ull;
      }
      return h;
    }
  };

  static Tensor pack(const Tensor& weight, Direction direction) {
    const DType dtype = dtype_of(weight);
    const int64_t n = weight.size(0), k = weight.size(1);
    Tensor packed = at::empty({cpu::packed_bytes(dtype, direction, n, k)}, weight.options().dtype(at::kByte));
    cpu::pack_weight(dtype, direction, weight.const_data_ptr(), weight.stride(0), weight.stride(1), n, k,
                     packed.mutable_data_ptr(), thread_pool());
    return packed;
  }

  void drop_dead() {
    for (auto it = entries_.begin(); it != entries_.end();)
      it = it->second.owner.expired() ? entries_.erase(it) : std::next(it);
  }

  std::mutex mutex_;
  std::unordered_map<const c10::TensorImpl*, Entry> entries_;
  bool enabled_ = true;
};

PackedWeights& packed_weights() {
  static PackedWeights* weights = new PackedWeights;  // never destroyed: tensors may outlive static destructors
  return *weights;
}

// Packing moves N K elements: not worth it for one call on few rows.
constexpr int64_t kMinRowsToPack = 64;

// The weight as the kernels want it, or undefined: then the library computes the base product.
Tensor packed_or_undefined(const OptionalTensor& weight, int64_t rows, Direction direction) {
  if (!weight || !cpu::fuses_base(dtype_of(*weight))) return {};
  if (rows < kMinRowsToPack && !packed_weights().cacheable(*weight)) return {};
  const bool dense = weight->is_non_overlapping_and_dense() && (weight->stride(0) == 1 || weight->stride(1) == 1);
  return packed_weights().get(dense ? *weight : weight->contiguous(), direction);
}

// --- operators -------------------------------------------------------------------------------------------------------

void forward(const Tensor& x_in, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_a,
             const Tensor& lora_b, const OptionalTensor& dash_u, const OptionalTensor& dash_vt,
             const OptionalTensor& dash_sigma, const OptionalTensor& seed, double scaling, int64_t threshold,
             const OptionalTensor& base, const Tensor& y, const Tensor& p) {
  const Tensor x = unit_rows(x_in);
  const AdapterTensors adapters(lora_a, lora_b, dash_u, dash_vt, dash_sigma, scaling);
  const Tensor packed = packed_or_undefined(weight, x.size(0), Direction::kForward);
  const Tensor bias32 = packed.defined() ? fp32(bias) : Tensor();
  Tensor addend = base ? base->contiguous() : Tensor();
  if (weight && !packed.defined()) {
    Tensor out = y;
    at::linear_out(out, x, *weight, bias);
    addend = y;
  }
  const ForwardParams params{{x.size(0), x.size(1), y.size(1)},
                             adapters.params,
                             dropout_of(seed, threshold),
                             dtype_of(x),
                             x.const_data_ptr(),
                             x.stride(0),
                             packed.defined() ? packed.const_data_ptr() : nullptr,
                             float_data(bias32),
                             addend.defined() ? addend.const_data_ptr() : nullptr,
                             y.mutable_data_ptr(),
                             p.mutable_data_ptr<float>()};
  cpu::forward(params, thread_pool());
}

void backward(const Tensor& dy_in, const Tensor& x_in, const OptionalTensor& weight, const Tensor& lora_a,
              const Tensor& lora_b, const OptionalTensor& dash_u, const OptionalTensor& dash_vt,
              const OptionalTensor& dash_sigma, const Tensor& p, const OptionalTensor& seed, double scaling,
              int64_t threshold, const OptionalTensor& dx, const OptionalTensor& da, const OptionalTensor& db_lora,
              const OptionalTensor& dsigma, const OptionalTensor& dbias) {
  const Tensor x = unit_rows(x_in), dy = unit_rows(dy_in);
  const AdapterTensors adapters(lora_a, lora_b, dash_u, dash_vt, dash_sigma, scaling);
  const Tensor packed = dx ? packed_or_undefined(weight, x.size(0), Direction::kBackward) : Tensor();
  Tensor addend;
  if (dx && weight && !packed.defined()) {
    addend = *dx;
    at::mm_out(addend, dy, *weight);
  }
  const BackwardParams params{{x.size(0), x.size(1), dy.size(1)},
                              adapters.params,
                              dropout_of(seed, threshold),
                              dtype_of(x),
                              dy.const_data_ptr(),
                              dy.stride(0),
                              x.const_data_ptr(),
                              x.stride(0),
                              packed.defined() ? packed.const_data_ptr() : nullptr,
                              addend.defined() ? addend.const_data_ptr() : nullptr,
                              p.const_data_ptr<float>(),
                              dx ? dx->mutable_data_ptr() : nullptr,
                              float_out(da),
                              float_out(db_lora),
                              float_out(dsigma),
                              float_out(dbias)};
  cpu::backward(params, thread_pool());
}

Tensor dropout_mask(const Tensor& seed, int64_t threshold, int64_t m, int64_t k) {
  Tensor keep = at::empty({m, k}, seed.options().dtype(at::kByte));
  cpu::dropout_mask(dropout_of(seed, threshold), m, k, keep.mutable_data_ptr<uint8_t>());
  return keep.to(at::kBool);
}

TORCH_LIBRARY(loradash_cpu, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, "
      "Tensor? dash_sigma, Tensor? seed, float scaling, int threshold, Tensor? base, Tensor(a!) y, Tensor(b!) p) -> ()",
      &forward);
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, "
      "Tensor? dash_sigma, Tensor p, Tensor? seed, float scaling, int threshold, Tensor(a!)? dx, Tensor(b!)? da, "
      "Tensor(c!)? db_lora, Tensor(d!)? dsigma, Tensor(e!)? dbias) -> ()",
      &backward);
  m.def("dropout_mask(Tensor seed, int threshold, int m, int k) -> Tensor", &dropout_mask);
}

}  // namespace

// What is not an operator: facts about the build and the machine, and the switch of the packed-weight cache.
PYBIND11_MODULE(_C, m) {
  m.def(
      "isa", [](int dtype) { return cpu::isa_name(static_cast<DType>(dtype)); },
      "Instruction set that serves a dtype.");
  m.def("fuses_base", [](int dtype) { return cpu::fuses_base(static_cast<DType>(dtype)); });
  m.def("enable_packed_weights", [](bool on) { packed_weights().enable(on); });
  m.def("packed_weight_bytes", [] { return packed_weights().bytes(); });
  m.def("compiler", [] { return __VERSION__; });
  gpu::define_gpu(m);
#ifdef _OPENMP
  m.attr("parallel") = true;
#else
  m.attr("parallel") = false;  // at::parallel_for runs serially without OpenMP
#endif
}

}  // namespace loradash
