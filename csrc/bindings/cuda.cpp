// Torch's side of the CUDA kernels: tensors to a problem, plans as data for whoever wants to read or emulate them, and,
// in a build with CUDA, the backend itself.
#include <ATen/Functions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/plan/plan.h"
#ifdef LORADASH_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launch.h"
#endif

namespace loradash::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK(false, "loradash CUDA kernels take bfloat16 and float16, and float32 adapters, got ",
                  t.scalar_type());
  }
}

const void* data(const Tensor& t) { return t.defined() && t.numel() > 0 ? t.const_data_ptr() : nullptr; }
template <typename T = void>
T* out(const OptionalTensor& t) {
  return t && t->numel() > 0 ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// A problem, and the tensors that had to be copied for it.
struct Call {
  Problem problem{};
  std::vector<Tensor> kept;

  const Tensor& keep(Tensor t) {
    kept.push_back(std::move(t));
    return kept.back();
  }
  // Rows of unit stride; the distance between rows is free.
  const Tensor& rows(const Tensor& t) { return keep(t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous()); }

  Call(const Tensor& x_in, const OptionalTensor& weight, const Tensor& lora_a, const Tensor& lora_b,
       const OptionalTensor& dash_u, const OptionalTensor& dash_vt, const OptionalTensor& dash_sigma,
       const OptionalTensor& seed, double scaling, int64_t threshold, Card card) {
    kept.reserve(16);
    Problem& q = problem;
    const Tensor& x = rows(x_in);
    q.shape = {x.size(0), x.size(1), lora_b.size(0)};
    constexpr int64_t kMost = (int64_t{1} << 31) - 256;  // the kernels count rows and columns in 32 bits
    TORCH_CHECK(std::max({q.shape.m, q.shape.k, q.shape.n}) < kMost,
                "loradash CUDA kernels take sizes below 2^31, got x ", x.sizes(), " and ", q.shape.n, " out_features");
    TORCH_CHECK(x.element_size() == 2, "loradash CUDA kernels take bfloat16 and float16, got ", x.scalar_type());
    q.dtype = dtype_of(x);
    q.x = data(x), q.ldx = x.stride(0);
    q.rank = lora_a.size(0);
    q.directions = dash_sigma ? dash_sigma->size(0) : 0;
    q.scaling = static_cast<float>(scaling);
    q.threshold = static_cast<uint32_t>(threshold);
    q.seed = seed && threshold > 0 ? seed->const_data_ptr<int64_t>() : nullptr;
    q.card = card;
    if (weight) {
      TORCH_CHECK(weight->device() == x.device() && weight->scalar_type() == x.scalar_type(), "weight is ",
                  weight->scalar_type(), " on ", weight->device(), ", x is ", x.scalar_type(), " on ", x.device());
      const bool by_rows = weight->size(1) <= 1 || weight->stride(1) == 1, by_columns = weight->stride(0) == 1;
      const Tensor& w = keep(by_rows || by_columns ? *weight : weight->contiguous());
      q.weight = data(w);
      q.weight_n = w.stride(0), q.weight_k = w.size(1) <= 1 ? 1 : w.stride(1);
    }
    const OptionalTensor adapters[] = {lora_a, lora_b, dash_u, dash_vt};
    for (int i = 0; i < 4; ++i) {
      if (!adapters[i]) continue;
      const Tensor& t = keep(adapters[i]->scalar_type() == at::kDouble ? adapters[i]->to(at::kFloat).contiguous()
                                                                       : adapters[i]->contiguous());
      q.adapters[i] = data(t), q.adapter_dtypes[i] = dtype_of(t);
    }
    if (dash_sigma) q.dash_sigma = static_cast<const float*>(data(keep(dash_sigma->to(at::kFloat).contiguous())));
  }

  ForwardOut forward(const OptionalTensor& bias, const OptionalTensor& base, const Tensor& y, const Tensor& p) {
    ForwardOut o{};
    const auto dtype = kept.front().scalar_type();
    if (bias) o.bias = data(keep(bias->to(dtype).contiguous()));
    if (base) o.base = data(keep(base->contiguous()));
    o.y = out(y), o.p = out<float>(p);
    return o;
  }

  BackwardOut backward(const Tensor& dy_in, const Tensor& p, const OptionalTensor& dx, const OptionalTensor& da,
                       const OptionalTensor& db_lora, const OptionalTensor& dsigma, const OptionalTensor& dbias) {
    const Tensor& dy = rows(dy_in);
    return {data(dy),
            dy.stride(0),
            static_cast<const float*>(data(keep(p.contiguous()))),
            out(dx),
            out<float>(da),
            out<float>(db_lora),
            out<float>(dsigma),
            out<float>(dbias)};
  }
};

// Adds workspace, and plans again with its address.
template <typename Make>
Plan with_workspace(Call& call, const Make& make) {
  const Plan size = make(nullptr);
  const Tensor& memory = call.keep(at::empty({size.workspace_bytes}, call.kept.front().options().dtype(at::kByte)));
  return make(memory.numel() ? memory.mutable_data_ptr() : nullptr);
}

using CardNumbers = std::pair<int32_t, int32_t>;  // processors, bytes of shared memory a block may take
using LaunchTuple = std::tuple<std::string, std::array<uint32_t, 3>, uint32_t, uint32_t, pybind11::bytes>;

// Kernel, grid, threads, shared bytes, parameters; and the tensors that these point to, the workspace last.
std::pair<std::vector<LaunchTuple>, std::vector<Tensor>> as_data(const Plan& plan, Call call) {
  std::vector<LaunchTuple> launches;
  for (const Launch& l : plan.launches) {
    launches.emplace_back(l.kernel, std::array<uint32_t, 3>{l.grid[0], l.grid[1], l.grid[2]}, l.threads, l.shared_bytes,
                          pybind11::bytes(reinterpret_cast<const char*>(l.params.data()), l.params.size()));
  }
  return {std::move(launches), std::move(call.kept)};
}

auto planned_forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_a,
                     const Tensor& lora_b, const OptionalTensor& dash_u, const OptionalTensor& dash_vt,
                     const OptionalTensor& dash_sigma, const OptionalTensor& seed, double scaling, int64_t threshold,
                     const OptionalTensor& base, const Tensor& y, const Tensor& p, CardNumbers card,
                     const std::string& tile) {
  Call call(x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold,
            {card.first, card.second});
  const ForwardOut o = call.forward(bias, base, y, p);
  const Plan plan = with_workspace(call, [&](void* memory) { return plan_forward(call.problem, o, memory, tile); });
  return as_data(plan, std::move(call));
}

auto planned_backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& lora_a,
                      const Tensor& lora_b, const OptionalTensor& dash_u, const OptionalTensor& dash_vt,
                      const OptionalTensor& dash_sigma, const Tensor& p, const OptionalTensor& seed, double scaling,
                      int64_t threshold, const OptionalTensor& dx, const OptionalTensor& da,
                      const OptionalTensor& db_lora, const OptionalTensor& dsigma, const OptionalTensor& dbias,
                      CardNumbers card, const std::string& tile) {
  Call call(x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold,
            {card.first, card.second});
  const BackwardOut o = call.backward(dy, p, dx, da, db_lora, dsigma, dbias);
  const Plan plan = with_workspace(call, [&](void* memory) { return plan_backward(call.problem, o, memory, tile); });
  return as_data(plan, std::move(call));
}

#ifdef LORADASH_WITH_CUDA

void check(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();  // told here, not by the next call
  TORCH_CHECK(error == cudaSuccess, "loradash: ", cudaGetErrorString(error));
}

Card card_of(int device) {
  Card card{};
  check(cudaDeviceGetAttribute(&card.processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&card.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return card;
}

void run_plan(const Plan& plan, const Problem& q) {
  const std::string failure = run(plan.launches, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(failure.empty(), "loradash, M = ", q.shape.m, ", K = ", q.shape.k, ", N = ", q.shape.n, ", r = ", q.rank,
              ", s = ", q.directions, ": ", failure);
}

void forward(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& lora_a,
             const Tensor& lora_b, const OptionalTensor& dash_u, const OptionalTensor& dash_vt,
             const OptionalTensor& dash_sigma, const OptionalTensor& seed, double scaling, int64_t threshold,
             const OptionalTensor& base, const Tensor& y, const Tensor& p, c10::string_view tile) {
  const c10::cuda::CUDAGuard guard(x.device());
  Call call(x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, card_of(x.get_device()));
  const ForwardOut o = call.forward(bias, base, y, p);
  const auto make = [&](void* memory) { return plan_forward(call.problem, o, memory, std::string(tile)); };
  run_plan(with_workspace(call, make), call.problem);
}

void backward(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, const Tensor& lora_a,
              const Tensor& lora_b, const OptionalTensor& dash_u, const OptionalTensor& dash_vt,
              const OptionalTensor& dash_sigma, const Tensor& p, const OptionalTensor& seed, double scaling,
              int64_t threshold, const OptionalTensor& dx, const OptionalTensor& da, const OptionalTensor& db_lora,
              const OptionalTensor& dsigma, const OptionalTensor& dbias, c10::string_view tile) {
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.size(0) == 0 || lora_b.size(0) == 0) {
    for (const OptionalTensor& grad : {dx, da, db_lora, dsigma, dbias}) {
      if (grad) grad->zero_();
    }
    return;
  }
  Call call(x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, card_of(x.get_device()));
  const BackwardOut o = call.backward(dy, p, dx, da, db_lora, dsigma, dbias);
  const auto make = [&](void* memory) { return plan_backward(call.problem, o, memory, std::string(tile)); };
  run_plan(with_workspace(call, make), call.problem);
}

TORCH_LIBRARY(loradash_cuda, m) {
  m.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, "
      "Tensor? dash_sigma, Tensor? seed, float scaling, int threshold, Tensor? base, Tensor(a!) y, Tensor(b!) p, "
      "str tile='') -> ()",
      &forward);
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, "
      "Tensor? dash_sigma, Tensor p, Tensor? seed, float scaling, int threshold, Tensor(a!)? dx, Tensor(b!)? da, "
      "Tensor(c!)? db_lora, Tensor(d!)? dsigma, Tensor(e!)? dbias, str tile='') -> ()",
      &backward);
}

#endif

}  // namespace

void define_cuda(pybind11::module_& m) {
#ifdef LORADASH_WITH_CUDA
  m.attr("cuda_architectures") = architectures();
  m.def("cuda_runs_on", [](int device) {  // has this build code for the card?
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    cudaFuncAttributes attributes;
    const bool runs = cudaFuncGetAttributes(&attributes, find_forward_kernel("pack_bf16")) == cudaSuccess;
    if (!runs) (void)cudaGetLastError();
    return runs;
  });
  m.def("cuda_card", [](int device) {
    const Card card = card_of(device);
    return CardNumbers{card.processors, card.shared_limit};
  });
#else
  m.attr("cuda_architectures") = pybind11::none();
#endif
  m.attr("cuda_max_width") = kMaxWidth;
  m.def("cuda_tiles", [](CardNumbers card) { return gemm_tiles({card.first, card.second}); });
  m.def("cuda_plan_forward", &planned_forward, "The launches of a forward call as data; runs nothing.");
  m.def("cuda_plan_backward", &planned_backward, "The launches of a backward call as data; runs nothing.");
}

}  // namespace loradash::cuda
