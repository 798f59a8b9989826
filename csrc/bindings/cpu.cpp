// Torch's side of the CPU kernels: tensors to pointers, and the library's base product where ours is not the faster
// one. Schemas of the public operators are in Python; these are their CPU backend.
#include "bindings/cpu.h"

#include <ATen/Functions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <utility>
#include <vector>

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

  AdapterTensors(const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& dash_u,
                 const OptionalTensor& dash_vt, const OptionalTensor& dash_sigma, double scaling)
      : a(fp32(lora_a)),
        b(fp32(lora_b)),
        u(fp32(dash_u)),
        vt(fp32(dash_vt)),
        sigma(fp32(dash_sigma)),
        params{float_data(a),
               float_data(b),
               float_data(u),
               float_data(vt),
               float_data(sigma),
               a.size(0),
               u.defined() ? u.size(1) : 0,
               static_cast<float>(scaling)} {}
  explicit AdapterTensors(const auto& call)
      : AdapterTensors(call.lora_a, call.lora_b, call.dash_u, call.dash_vt, call.dash_sigma, call.scaling) {}
  // The adapters of a member of a group.
  AdapterTensors(const auto& call, size_t i)
      : AdapterTensors(call.lora_a[i], call.lora_b[i], call.dash_u[i], call.dash_vt[i], call.dash_sigma[i],
                       call.scaling[i]) {}
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

// A layer of a forward call, and what must live as long as its pointers.
struct ForwardLayer {
  AdapterTensors adapters;
  Tensor packed, bias, base;

  // `given` is a base product that is there already. One that our kernels do not compute goes into y.
  ForwardLayer(AdapterTensors a, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& own_bias,
               const OptionalTensor& given, const Tensor& y)
      : adapters(std::move(a)), packed(packed_or_undefined(weight, x.size(0), Pass::kForward)) {
    if (packed.defined()) bias = fp32(own_bias);
    if (given) base = plain(*given).contiguous();
    if (weight && !packed.defined()) {
      base = y;
      at::linear_out(base, x, *weight, own_bias);
    }
  }

  ForwardMember member(const Tensor& y) const {
    return {y.size(1), adapters.params, data(packed), float_data(bias), data(base), y.mutable_data_ptr()};
  }
};

void forward_of(const Tensor& x, const Dropout& dropout, const ForwardMember* members, int64_t count, const Tensor& p) {
  const ForwardParams params{x.size(0),
                             x.size(1),
                             dropout,
                             dtype_of(x),
                             x.const_data_ptr(),
                             x.stride(0),
                             members,
                             count,
                             p.mutable_data_ptr<float>()};
  forward(params, thread_pool());
}

void run_forward(const ForwardCall& call) {
  const Tensor x = unit_rows(call.x);
  const ForwardLayer layer(AdapterTensors(call), x, call.weight, call.bias, call.base, call.y);
  const ForwardMember member = layer.member(call.y);
  forward_of(x, dropout_of(call.seed, call.threshold), &member, 1, call.p);
}

void run_group_forward(const GroupForwardCall& call) {
  const Tensor x = unit_rows(call.x);
  std::vector<ForwardLayer> layers;
  std::vector<ForwardMember> members;
  layers.reserve(call.weight.size());
  for (size_t i = 0; i < call.weight.size(); ++i) {
    const OptionalTensor bias = call.bias[i].numel() ? OptionalTensor(call.bias[i]) : std::nullopt;
    layers.emplace_back(AdapterTensors(call, i), x, call.weight[i], bias, std::nullopt, call.y[i]);
    members.push_back(layers.back().member(call.y[i]));
  }
  forward_of(x, dropout_of(call.seed, call.threshold), members.data(), static_cast<int64_t>(members.size()), call.p);
}

struct BackwardLayer {
  Tensor dy;
  AdapterTensors adapters;
  Tensor packed;

  // Where our kernels do not compute dy W, it is written into dx, or added to what `base`, which is dx then, holds.
  BackwardLayer(const Tensor& given_dy, AdapterTensors a, const OptionalTensor& weight, const OptionalTensor& dx,
                Tensor& base)
      : dy(unit_rows(given_dy)), adapters(std::move(a)) {
    if (!dx || !weight) return;
    packed = packed_or_undefined(weight, dy.size(0), Pass::kBackward);
    if (packed.defined()) return;
    if (base.defined())
      base.addmm_(dy, *weight);
    else
      base = *dx, at::mm_out(base, dy, *weight);
  }

  BackwardMember member(const OptionalTensor& da, const OptionalTensor& db_lora, const OptionalTensor& dsigma,
                        const OptionalTensor& dbias) const {
    return {dy.size(1),    adapters.params,    dy.const_data_ptr(), dy.stride(0),    data(packed),
            float_out(da), float_out(db_lora), float_out(dsigma),   float_out(dbias)};
  }
};

void backward_of(const Tensor& x, const Dropout& dropout, const BackwardMember* members, int64_t count,
                 const Tensor& base, const Tensor& p, const OptionalTensor& dx) {
  const Tensor plain_p = plain(p).contiguous();
  const BackwardParams params{x.size(0),
                              x.size(1),
                              dropout,
                              dtype_of(x),
                              x.const_data_ptr(),
                              x.stride(0),
                              members,
                              count,
                              data(base),
                              plain_p.const_data_ptr<float>(),
                              dx ? dx->mutable_data_ptr() : nullptr};
  backward(params, thread_pool());
}

void run_backward(const BackwardCall& call) {
  const Tensor x = unit_rows(call.x);
  Tensor base;
  const BackwardLayer layer(call.dy, AdapterTensors(call), call.weight, call.dx, base);
  const BackwardMember member = layer.member(call.da, call.db_lora, call.dsigma, call.dbias);
  backward_of(x, dropout_of(call.seed, call.threshold), &member, 1, base, call.p, call.dx);
}

void run_group_backward(const GroupBackwardCall& call) {
  const Tensor x = unit_rows(call.x);
  Tensor base;
  std::vector<BackwardLayer> layers;
  std::vector<BackwardMember> members;
  layers.reserve(call.weight.size());
  for (size_t i = 0; i < call.weight.size(); ++i) {
    layers.emplace_back(call.dy[i], AdapterTensors(call, i), call.weight[i], call.dx, base);
    members.push_back(layers.back().member(call.da[i], call.db_lora[i], call.dsigma[i], call.dbias[i]));
  }
  backward_of(x, dropout_of(call.seed, call.threshold), members.data(), static_cast<int64_t>(members.size()), base,
              call.p, call.dx);
}

Tensor mask(const Tensor& seed, int64_t threshold, int64_t m, int64_t k) {
  Tensor keep = at::empty({m, k}, seed.options().dtype(at::kByte));
  dropout_mask(dropout_of(seed, threshold), m, k, keep.mutable_data_ptr<uint8_t>());
  return keep.to(at::kBool);
}

TORCH_LIBRARY(loradash_cpu, m) {
  m.def(operator_schema<ForwardCall>("forward").c_str(), flat<run_forward>);
  m.def(operator_schema<BackwardCall>("backward").c_str(), flat<run_backward>);
  m.def(operator_schema<GroupForwardCall>("group_forward").c_str(), flat<run_group_forward>);
  m.def(operator_schema<GroupBackwardCall>("group_backward").c_str(), flat<run_group_backward>);
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
