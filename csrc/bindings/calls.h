// A call of a fused operator as one value, and the functions of a flat argument list that Torch and pybind11 register.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "problem.h"

namespace loradash {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

// The arguments of the operators, in the order of their schemas. `fields` repeats that order: C++ cannot list the
// members of a struct.
struct ForwardCall {
  const Tensor& x;                   // (M, K)
  const OptionalTensor& weight;      // (N, K)
  const OptionalTensor& bias;        // (N)
  const Tensor& lora_a;              // (r, K)
  const Tensor& lora_b;              // (N, r)
  const OptionalTensor& dash_u;      // (N, s)
  const OptionalTensor& dash_vt;     // (s, K)
  const OptionalTensor& dash_sigma;  // (s)
  const OptionalTensor& seed;        // (2), or (4) with the place of a window
  double scaling;
  int64_t threshold;
  const OptionalTensor& base;  // (M, N)
  const Tensor& y;             // (M, N)
  const Tensor& p;             // (M, R)

  static constexpr const char* kSchema =
      "Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, "
      "Tensor? dash_sigma, Tensor? seed, float scaling, int threshold, Tensor? base, Tensor(a!) y, Tensor(b!) p";
  auto fields() const {
    return std::tie(x, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, base, y, p);
  }
};

struct BackwardCall {
  const Tensor& dy;                  // (M, N)
  const Tensor& x;                   // (M, K)
  const OptionalTensor& weight;      // (N, K)
  const Tensor& lora_a;              // (r, K)
  const Tensor& lora_b;              // (N, r)
  const OptionalTensor& dash_u;      // (N, s)
  const OptionalTensor& dash_vt;     // (s, K)
  const OptionalTensor& dash_sigma;  // (s)
  const Tensor& p;                   // (M, R)
  const OptionalTensor& seed;        // (2), or (4) with the place of a window
  double scaling;
  int64_t threshold;
  const OptionalTensor& dx;       // (M, K)
  const OptionalTensor& da;       // (r, K)
  const OptionalTensor& db_lora;  // (N, r)
  const OptionalTensor& dsigma;   // (s)
  const OptionalTensor& dbias;    // (N)

  static constexpr const char* kSchema =
      "Tensor dy, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, "
      "Tensor? dash_sigma, Tensor p, Tensor? seed, float scaling, int threshold, Tensor(a!)? dx, Tensor(b!)? da, "
      "Tensor(c!)? db_lora, Tensor(d!)? dsigma, Tensor(e!)? dbias";
  auto fields() const {
    return std::tie(dy, x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, p, seed, scaling, threshold, dx, da,
                    db_lora, dsigma, dbias);
  }
};

// The members of a group, in lists of one length; they share x, the mask, and what is P or dx.
struct GroupForwardCall {
  const Tensor& x;                  // (M, K)
  const at::TensorList weight;      // (N, K) each
  const at::TensorList bias;        // (N), or (0) for none
  const at::TensorList lora_a;      // (r, K)
  const at::TensorList lora_b;      // (N, r)
  const at::TensorList dash_u;      // (N, s), s may be 0
  const at::TensorList dash_vt;     // (s, K)
  const at::TensorList dash_sigma;  // (s)
  const OptionalTensor& seed;       // (2), or (4) with the place of a window
  const at::ArrayRef<double> scaling;
  int64_t threshold;
  const at::TensorList y;  // (M, N)
  const Tensor& p;         // (M, R) of all members

  static constexpr const char* kSchema =
      "Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] lora_a, Tensor[] lora_b, Tensor[] dash_u, Tensor[] dash_vt, "
      "Tensor[] dash_sigma, Tensor? seed, float[] scaling, int threshold, Tensor(a!)[] y, Tensor(b!) p";
  auto fields() const {
    return std::tie(x, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, y, p);
  }
};

struct GroupBackwardCall {
  const at::TensorList dy;          // (M, N) each
  const Tensor& x;                  // (M, K)
  const at::TensorList weight;      // (N, K)
  const at::TensorList lora_a;      // (r, K)
  const at::TensorList lora_b;      // (N, r)
  const at::TensorList dash_u;      // (N, s)
  const at::TensorList dash_vt;     // (s, K)
  const at::TensorList dash_sigma;  // (s)
  const Tensor& p;                  // (M, R) of all members
  const OptionalTensor& seed;       // that of forward
  const at::ArrayRef<double> scaling;
  int64_t threshold;
  const OptionalTensor& dx;        // (M, K)
  const OptionalTensors& da;       // (r, K)
  const OptionalTensors& db_lora;  // (N, r)
  const OptionalTensors& dsigma;   // (s)
  const OptionalTensors& dbias;    // (N)

  static constexpr const char* kSchema =
      "Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor[] dash_u, Tensor[] dash_vt, "
      "Tensor[] dash_sigma, Tensor p, Tensor? seed, float[] scaling, int threshold, Tensor(a!)? dx, Tensor(b!)?[] da, "
      "Tensor(c!)?[] db_lora, Tensor(d!)?[] dsigma, Tensor(e!)?[] dbias";
  auto fields() const {
    return std::tie(dy, x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, p, seed, scaling, threshold, dx, da,
                    db_lora, dsigma, dbias);
  }
};

// The schema of the operator that takes a call and, where `more` names some, further arguments.
template <typename Call>
std::string operator_schema(const char* name, const char* more = "") {
  return std::string(name) + "(" + Call::kSchema + more + ") -> ()";
}

// Numbers and views of lists are arguments by value, tensors by reference.
template <typename Field>
using Argument =
    std::conditional_t<std::is_trivially_copyable_v<std::remove_cvref_t<Field>>, std::remove_cvref_t<Field>, Field>;

template <auto kFunction, typename Signature, typename Fields>
struct FlatFunction;
template <auto kFunction, typename Result, typename Call, typename... More, typename... Fields>
struct FlatFunction<kFunction, Result (*)(const Call&, More...), std::tuple<Fields...>> {
  static Result call(Argument<Fields>... fields, More... more) { return kFunction(Call{fields...}, more...); }
};

template <typename Result, typename Call, typename... More>
auto fields_of(Result (*)(const Call&, More...)) -> decltype(std::declval<Call>().fields());

// flat<f>, for a function f(call, more...), takes every field of the call by itself, then more: operators are
// registered as such functions.
template <auto kFunction>
constexpr auto* flat = &FlatFunction<kFunction, decltype(kFunction), decltype(fields_of(kFunction))>::call;

// The error that another dtype raises begins with `taken`: what the kernels of a device take.
inline DType dtype_of(const Tensor& t, const char* taken) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "loradash ", taken, ", got ", t.scalar_type());
  }
}

}  // namespace loradash
