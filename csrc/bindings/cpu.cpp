// Torch's side of the CPU kernels: tensors to pointers, and the library's base product where ours is not the faster
// one. Schemas of the public operators are in Python; these are their CPU backend.
#include <ATen/Functions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <optional>

#include "bindings/packed_weights.h"

namespace loradash {
namespace cuda {
void define_cuda(pybind11::module_& m);  // cuda.cpp
}
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- conversions -----------------------------------------------------------------------------------------------------

// Memory that holds what the tensor says: a view with the negative bit is written out.
Tensor plain(const Tensor& t) { return t.is_neg() ? t.resolve_neg() : t; }

// Rows of unit stride; the distance between rows is free.
Tensor unit_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? plain(t) : plain(t).contiguous(); }

Tensor fp32(const OptionalTensor& t) { return t ? plain(*t).to(at::kFloat).contiguous() : Tensor(); }

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

// The weight as the kernels want it, or undefined: then the library computes the base product.
Tensor packed_or_undefined(const OptionalTensor& weight, int64_t rows, Direction direction) {
  if (!weight) return {};
  const int64_t min_rows = cpu::min_base_rows(dtype_of(*weight));
  if (min_rows == 0 || rows < min_rows) return {};
  const Tensor w = plain(*weight);
  return packed_weights().get(w.stride(0) == 1 || w.stride(1) == 1 ? w : w.contiguous(), direction, rows);
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
  Tensor addend = base ? plain(*base).contiguous() : Tensor();
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
              const OptionalTensor& dash_sigma, const Tensor& p_in, const OptionalTensor& seed, double scaling,
              int64_t threshold, const OptionalTensor& dx, const OptionalTensor& da, const OptionalTensor& db_lora,
              const OptionalTensor& dsigma, const OptionalTensor& dbias) {
  const Tensor x = unit_rows(x_in), dy = unit_rows(dy_in), p = plain(p_in).contiguous();
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
  m.def(
      "min_base_rows", [](int dtype) { return cpu::min_base_rows(static_cast<DType>(dtype)); },
      "Rows of x from which on the base product of a dtype is ours, not the library's; 0: never.");
  m.def("fingerprint", &fingerprint_of, "The fingerprint of a matrix of which one stride is 1.");
  m.def("enable_packed_weights", [](bool on) { packed_weights().enable(on); });
  m.def("invalidate_packed_weights",
        [](const OptionalTensor& weight) { weight ? packed_weights().invalidate(*weight) : packed_weights().clear(); });
  m.def("packed_weight_bytes", [] { return packed_weights().bytes(); });
  m.def("compiler", [] { return __VERSION__; });
  cuda::define_cuda(m);
#ifdef _OPENMP
  m.attr("parallel") = true;
#else
  m.attr("parallel") = false;  // at::parallel_for runs serially without OpenMP
#endif
}

}  // namespace loradash
