// Torch's side of the CPU kernels: tensors to pointers, and the library's base product where ours is not the faster
// one. Schemas of the public operators are in Python; these are their CPU backend.
#include "bindings/cpu.h"

#include <ATen/Functions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "bindings/packed_weights.h"

namespace loradash::cpu {
namespace {

// Returns memory that holds what the tensor says: a view with the negative bit is written out.
Tensor plain(const Tensor& t) { return t.is_neg() ? t.resolve_neg() : t; }

// The kernels take rows of unit stride; the distance between rows is free.
Tensor unit_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? plain(t) : plain(t).contiguous(); }

Tensor fp32(const OptionalTensor& t) { return t ? plain(*t).to(at::kFloat).contiguous() : Tensor(); }

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
const float* float_data(const Tensor& t) { return static_cast<const float*>(data(t)); }
float* float_out(const OptionalTensor& t) { return t ? t->mutable_data_ptr<float>() : nullptr; }

// Copies the adapters where they are not fp32 already, and holds the copies for the length of a call.
struct AdapterTensors {
  Tensor a, b, u, vt, sigma;
  Fp32Adapters params;

  explicit AdapterTensors(const auto& call)
      : a(fp32(call.lora_a)),
        b(fp32(call.lora_b)),
        u(fp32(call.dash_u)),
        vt(fp32(call.dash_vt)),
        sigma(fp32(call.dash_sigma)),
        params{float_data(a),
               float_data(b),
               float_data(u),
               float_data(vt),
               float_data(sigma),
               a.size(0),
               u.defined() ? u.size(1) : 0,
               static_cast<float>(call.scaling)} {}
};

Dropout dropout_of(const OptionalTensor& seed, int64_t threshold) {
  if (!seed || threshold == 0) return {};
  const int64_t* words = seed->const_data_ptr<int64_t>();
  Dropout dropout{static_cast<uint64_t>(words[0]), static_cast<uint64_t>(words[1]), static_cast<uint32_t>(threshold)};
  if (seed->numel() == 4) {
    dropout.first_row = static_cast<uint32_t>(words[2]);
    dropout.first_block = static_cast<uint32_t>(words[3] / kPhiloxElements);
  }
  return dropout;
}

// Returns the weight as the kernels want it, or undefined: then the library computes the base product.
Tensor packed_or_undefined(const OptionalTensor& weight, int64_t rows, Pass pass) {
  if (!weight) return {};
  const int64_t min_rows = min_base_rows(dtype_of(*weight));
  if (min_rows == 0 || rows < min_rows) return {};
  const Tensor w = plain(*weight);
  return packed_weights().get(w.stride(0) == 1 || w.stride(1) == 1 ? w : w.contiguous(), pass, rows);
}

void run_forward(const ForwardCall& call) {
  const Tensor x = unit_rows(call.x);
  const AdapterTensors adapters(call);
  const Tensor packed = packed_or_undefined(call.weight, x.size(0), Pass::kForward);
  const Tensor bias = packed.defined() ? fp32(call.bias) : Tensor();
  Tensor base = call.base ? plain(*call.base).contiguous() : Tensor();
  if (call.weight && !packed.defined()) {
    base = call.y;
    at::linear_out(base, x, *call.weight, call.bias);
  }
  const ForwardParams params{{x.size(0), x.size(1), call.y.size(1)},
                             adapters.params,
                             dropout_of(call.seed, call.threshold),
                             dtype_of(x),
                             x.const_data_ptr(),
                             x.stride(0),
                             data(packed),
                             float_data(bias),
                             data(base),
                             call.y.mutable_data_ptr(),
                             call.p.mutable_data_ptr<float>()};
  forward(params, thread_pool());
}

void run_backward(const BackwardCall& call) {
  const Tensor x = unit_rows(call.x), dy = unit_rows(call.dy), p = plain(call.p).contiguous();
  const AdapterTensors adapters(call);
  const Tensor packed = call.dx ? packed_or_undefined(call.weight, x.size(0), Pass::kBackward) : Tensor();
  Tensor base;
  if (call.dx && call.weight && !packed.defined()) {
    base = *call.dx;
    at::mm_out(base, dy, *call.weight);
  }
  const BackwardParams params{{x.size(0), x.size(1), dy.size(1)},
                              adapters.params,
                              dropout_of(call.seed, call.threshold),
                              dtype_of(x),
                              dy.const_data_ptr(),
                              dy.stride(0),
                              x.const_data_ptr(),
                              x.stride(0),
                              data(packed),
                              data(base),
                              p.const_data_ptr<float>(),
                              call.dx ? call.dx->mutable_data_ptr() : nullptr,
                              float_out(call.da),
                              float_out(call.db_lora),
                              float_out(call.dsigma),
                              float_out(call.dbias)};
  backward(params, thread_pool());
}

Tensor mask(const Tensor& seed, int64_t threshold, int64_t m, int64_t k) {
  Tensor keep = at::empty({m, k}, seed.options().dtype(at::kByte));
  dropout_mask(dropout_of(seed, threshold), m, k, keep.mutable_data_ptr<uint8_t>());
  return keep.to(at::kBool);
}

TORCH_LIBRARY(loradash_cpu, m) {
  m.def(operator_schema<ForwardCall>("forward").c_str(), flat<run_forward>);
  m.def(operator_schema<BackwardCall>("backward").c_str(), flat<run_backward>);
  m.def("dropout_mask(Tensor seed, int threshold, int m, int k) -> Tensor", &mask);
}

}  // namespace

// Python reaches here what is not an operator: facts about the machine, and the switch of the packed weights.
void define_cpu(pybind11::module_& m) {
  m.def("isa", [](int dtype) { return isa_name(static_cast<DType>(dtype)); }, "Instruction set that serves a dtype.");
  m.def(
      "min_base_rows", [](int dtype) { return min_base_rows(static_cast<DType>(dtype)); },
      "Rows of x from which on the base product of a dtype is ours, not the library's; 0: never.");
  m.def("fingerprint", &fingerprint_of, "The fingerprint of a matrix of which one stride is 1.");
  m.def("enable_packed_weights", [](bool on) { packed_weights().enable(on); });
  m.def("invalidate_packed_weights",
        [](const OptionalTensor& weight) { weight ? packed_weights().invalidate(*weight) : packed_weights().clear(); });
  m.def("packed_weight_bytes", [] { return packed_weights().bytes(); });
}

}  // namespace loradash::cpu
