// Torch's side of the CUDA kernels: tensors to a problem, plans as data for whoever wants to read or emulate them, and,
// in a build with CUDA, the backend itself.
#include <ATen/Functions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/calls.h"
#include "cuda/plan/plan.h"
#ifdef LORADASH_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launch.h"
#endif

namespace loradash::cuda {
namespace {

DType dtype_of(const Tensor& t) {
  return loradash::dtype_of(t, "CUDA kernels take bfloat16 and float16, and float32 adapters");
}

template <typename T = void>
const T* data(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T = void>
T* out(const OptionalTensor& t) {
  return t && t->numel() > 0 ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Holds what a call asks for, and the tensors that had to be copied for it.
class Request {
 public:
  Problem problem{};

  Request(const auto& call, Card card) {
    kept_.reserve(16);
    const Tensor& x = keep_rows(call.x);
    problem.shape = {x.size(0), x.size(1), call.lora_b.size(0)};
    check(problem.shape, x);
    problem.dtype = dtype_of(x);
    problem.x = data(x), problem.ldx = x.stride(0);
    if (call.weight) problem.weight = weight_of(*call.weight, x);
    auto& a = problem.adapters;
    a.lora_a = matrix(call.lora_a), a.lora_b = matrix(call.lora_b);
    if (call.dash_u) a.dash_u = matrix(*call.dash_u);
    if (call.dash_vt) a.dash_vt = matrix(*call.dash_vt);
    if (call.dash_sigma) a.dash_sigma = data<float>(keep(call.dash_sigma->to(at::kFloat).contiguous()));
    a.rank = call.lora_a.size(0), a.directions = call.dash_sigma ? call.dash_sigma->size(0) : 0;
    a.scaling = static_cast<float>(call.scaling);
    problem.dropout.threshold = static_cast<uint32_t>(call.threshold);
    if (call.seed && call.threshold > 0) {
      problem.dropout.seed = call.seed->template const_data_ptr<int64_t>();
      if (call.seed->numel() == 4) problem.dropout.window = problem.dropout.seed + 2;
    }
    problem.card = card;
  }

  // Plans the call in a workspace that is kept with it.
  Plan plan(const ForwardCall& call, const std::string& tile) {
    ForwardOut o{};
    if (call.bias) o.bias = data(keep(call.bias->to(kept_.front().scalar_type()).contiguous()));
    if (call.base) o.base = data(keep(call.base->contiguous()));
    o.y = out(call.y), o.p = out<float>(call.p);
    return with_workspace([&](void* memory) { return plan_forward(problem, o, memory, tile); });
  }
  Plan plan(const BackwardCall& call, const std::string& tile) {
    const Tensor& dy = keep_rows(call.dy);
    const BackwardOut o{data(dy),
                        dy.stride(0),
                        data<float>(keep(call.p.contiguous())),
                        out(call.dx),
                        out<float>(call.da),
                        out<float>(call.db_lora),
                        out<float>(call.dsigma),
                        out<float>(call.dbias)};
    return with_workspace([&](void* memory) { return plan_backward(problem, o, memory, tile); });
  }

  std::vector<Tensor> release() { return std::move(kept_); }

 private:
  const Tensor& keep(Tensor t) { return kept_.emplace_back(std::move(t)); }

  // The kernels take rows of unit stride; the distance between rows is free.
  const Tensor& keep_rows(const Tensor& t) { return keep(t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous()); }

  static void check(const Shape& shape, const Tensor& x) {
    // The kernels count rows and columns in 32 bits, up to the end of the last block of rows that one program takes.
    constexpr int64_t kMost = (int64_t{1} << 31) - (int64_t{1} << 20);
    TORCH_CHECK(std::max({shape.m, shape.k, shape.n}) < kMost,
                "loradash CUDA kernels take sizes below 2^31 - 2^20, got x ", x.sizes(), " and ", shape.n,
                " out_features");
    TORCH_CHECK(x.element_size() == 2, "loradash CUDA kernels take bfloat16 and float16, got ", x.scalar_type());
  }

  Weight weight_of(const Tensor& weight, const Tensor& x) {
    TORCH_CHECK(weight.device() == x.device() && weight.scalar_type() == x.scalar_type(), "weight is ",
                weight.scalar_type(), " on ", weight.device(), ", x is ", x.scalar_type(), " on ", x.device());
    const bool by_rows = weight.size(1) <= 1 || weight.stride(1) == 1, by_columns = weight.stride(0) == 1;
    const Tensor& w = keep(by_rows || by_columns ? weight : weight.contiguous());
    return {data(w), w.stride(0), w.size(1) <= 1 ? 1 : w.stride(1)};
  }

  TypedMatrix matrix(const Tensor& adapter) {
    const Tensor& t =
        keep(adapter.scalar_type() == at::kDouble ? adapter.to(at::kFloat).contiguous() : adapter.contiguous());
    return {data(t), dtype_of(t)};
  }

  // Plans once for the size of the workspace and again with its address.
  template <typename Make>
  Plan with_workspace(const Make& make) {
    const Plan size = make(nullptr);
    const Tensor& memory = keep(at::empty({size.workspace_bytes}, kept_.front().options().dtype(at::kByte)));
    return make(memory.numel() ? memory.mutable_data_ptr() : nullptr);
  }

  std::vector<Tensor> kept_;
};

// A Card as Python gives it: processors, and bytes of shared memory that a block may take.
using CardNumbers = std::pair<int32_t, int32_t>;
using LaunchTuple = std::tuple<std::string, std::array<uint32_t, 3>, uint32_t, uint32_t, pybind11::bytes>;

// Returns, for each launch, kernel, grid, threads, shared bytes and parameters; and the tensors that these point to,
// the workspace last.
template <typename Call>
std::pair<std::vector<LaunchTuple>, std::vector<Tensor>> planned(const Call& call, CardNumbers card,
                                                                 const std::string& tile) {
  Request request(call, {card.first, card.second});
  std::vector<LaunchTuple> launches;
  for (const KernelLaunch& l : request.plan(call, tile).launches) {
    launches.emplace_back(l.kernel, std::array<uint32_t, 3>{l.grid[0], l.grid[1], l.grid[2]}, l.threads, l.shared_bytes,
                          pybind11::bytes(reinterpret_cast<const char*>(l.params.data()), l.params.size()));
  }
  return {std::move(launches), request.release()};
}

#ifdef LORADASH_WITH_CUDA

void check(cudaError_t error) {
  // Clears CUDA's last error: it is reported here, and the next call must not report it again.
  if (error != cudaSuccess) (void)cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, "loradash: ", cudaGetErrorString(error));
}

Card card_of(int device) {
  Card card{};
  check(cudaDeviceGetAttribute(&card.processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&card.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return card;
}

template <typename Call>
void run_call(const Call& call, c10::string_view tile) {
  Request request(call, card_of(call.x.get_device()));
  const Plan plan = request.plan(call, std::string(tile));
  const std::string failure = run(plan.launches, c10::cuda::getCurrentCUDAStream());
  const Shape& shape = request.problem.shape;
  TORCH_CHECK(failure.empty(), "loradash, M = ", shape.m, ", K = ", shape.k, ", N = ", shape.n,
              ", r = ", request.problem.adapters.rank, ", s = ", request.problem.adapters.directions, ": ", failure);
}

void run_forward(const ForwardCall& call, c10::string_view tile) {
  const c10::cuda::CUDAGuard guard(call.x.device());
  run_call(call, tile);
}

void run_backward(const BackwardCall& call, c10::string_view tile) {
  const c10::cuda::CUDAGuard guard(call.x.device());
  if (call.x.size(0) > 0 && call.lora_b.size(0) > 0) return run_call(call, tile);
  for (const OptionalTensor* grad : {&call.dx, &call.da, &call.db_lora, &call.dsigma, &call.dbias}) {
    if (*grad) (*grad)->zero_();
  }
}

TORCH_LIBRARY(loradash_cuda, m) {
  m.def(operator_schema<ForwardCall>("forward", ", str tile=''").c_str(), flat<run_forward>);
  m.def(operator_schema<BackwardCall>("backward", ", str tile=''").c_str(), flat<run_backward>);
}

#endif

}  // namespace

void define_cuda(pybind11::module_& m) {
#ifdef LORADASH_WITH_CUDA
  m.attr("cuda_architectures") = architectures();
  m.def(
      "cuda_runs_on",
      [](int device) {
        const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
        cudaFuncAttributes attributes;
        const cudaError_t error = cudaFuncGetAttributes(&attributes, find_kernel("pack_bf16"));
        if (!says_no_code(error)) {
          check(error);
          return true;
        }
        (void)cudaGetLastError();
        return false;
      },
      "Whether this build has code for a card; raises where the card cannot be asked.");
  m.def("cuda_card", [](int device) {
    const Card card = card_of(device);
    return CardNumbers{card.processors, card.shared_limit};
  });
#else
  m.attr("cuda_architectures") = pybind11::none();
  // The sentence of setup.py that says why.
  m.attr("without_cuda") = LORADASH_WITHOUT_CUDA;
#endif
  m.attr("cuda_max_width") = kMaxWidth;
  m.def("cuda_tiles", [](CardNumbers card) { return gemm_tiles({card.first, card.second}); });
  m.def("cuda_plan_forward", flat<planned<ForwardCall>>, "The launches of a forward call as data; runs nothing.");
  m.def("cuda_plan_backward", flat<planned<BackwardCall>>, "The launches of a backward call as data; runs nothing.");
}

}  // namespace loradash::cuda
