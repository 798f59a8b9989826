// A call on the card: its operands in memory of exactly their size, its launches, and its results.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "cuda/launch.h"
#include "plain.h"

namespace check {

// A fault that a sanitizer must find.
enum class Plant { kNone, kWrite, kUninitialised, kRace, kSync };

inline void expect(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Card memory, freed with it.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (bytes) expect(cudaMalloc(&data_, bytes), "cudaMalloc");
  }
  Memory(Memory&& other) : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  ~Memory() { (void)cudaFree(data_); }

  void* data() const { return data_; }
  // Fills it with NaN, whatever the dtype.
  void poison() const {
    if (bytes_) expect(cudaMemset(data_, 0xFF, bytes_), "cudaMemset");
  }
  void put(const void* from, size_t bytes) const {
    if (bytes) expect(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy to the card");
  }
  void get(void* to) const {
    if (bytes_) expect(cudaMemcpy(to, data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy from the card");
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// The workspace is left unwritten: initcheck sees whoever reads what no kernel wrote.
class Call {
 public:
  Call(const Case& c, const Inputs& in, loradash::cuda::Card card, Plant plant) : case_(c) {
    using namespace loradash;
    const auto [m, k, n] = c.shape;
    if (c.processors) card.processors = c.processors;
    problem_.shape = c.shape, problem_.dtype = c.dtype, problem_.ldx = k, problem_.card = card;
    problem_.x = halves(in.x);
    problem_.weight = {nullptr, k, 1};
    if (c.weight == Layout::kRows) problem_.weight.data = halves(in.w);
    if (c.weight == Layout::kColumns) problem_.weight = {halves(transposed(in.w, n, k)), 1, n};
    // An element of A that nobody wrote is what initcheck must find.
    const size_t left_out = plant == Plant::kUninitialised ? 1 : 0;
    problem_.adapters = {floats(in.a, left_out),           floats(in.b), floats(in.u), floats(in.vt),
                         floats(in.sigma).data_as_float(), c.rank,       c.directions, in.scaling};
    if (c.threshold()) {
      problem_.dropout = {static_cast<const int64_t*>(fresh(sizeof(in.seed)).data()), c.threshold()};
      memory_.back().put(in.seed, sizeof(in.seed));
    }
    // The last chunk of y lies beyond its memory, but within what cudaMalloc hands out at least: memcheck must find the
    // write, and without it nothing breaks.
    const size_t y_bytes = 2 * m * n - (plant == Plant::kWrite ? 16 : 0);
    forward_ = {c.base ? nullptr : halves(in.bias), c.base ? halves(in.base) : nullptr, result("y", y_bytes),
                static_cast<float*>(scratch(4 * m * (c.rank + c.directions)))};
    backward_ = {halves(in.dy),
                 n,
                 forward_.p,
                 result("dx", 2 * m * k),
                 static_cast<float*>(result("dA", 4 * c.rank * k)),
                 static_cast<float*>(result("dB", 4 * n * c.rank)),
                 static_cast<float*>(result("dsigma", 4 * c.directions)),
                 static_cast<float*>(c.base ? nullptr : result("dbias", 4 * n))};
  }

  // Runs both passes, and returns each result by name; throws what went wrong.
  std::vector<std::pair<std::string, std::vector<double>>> run() {
    using namespace loradash::cuda;
    const int64_t bytes[] = {plan_forward(problem_, forward_, nullptr, case_.tile).workspace_bytes,
                             plan_backward(problem_, backward_, nullptr, case_.tile).workspace_bytes};
    start(plan_forward(problem_, forward_, scratch(bytes[0]), case_.tile).launches);
    start(plan_backward(problem_, backward_, scratch(bytes[1]), case_.tile).launches);
    expect(cudaDeviceSynchronize(), "the kernels");
    std::vector<std::pair<std::string, std::vector<double>>> found;
    for (const auto& [name, index, size] : results_) {
      std::vector<unsigned char> raw(size);
      memory_[index].get(raw.data());
      std::vector<double> values;
      const bool half = name == "y" || name == "dx";
      for (size_t at = 0; at + (half ? 2 : 4) <= size; at += half ? 2 : 4) {
        uint16_t bits;
        float number;
        std::memcpy(half ? static_cast<void*>(&bits) : &number, raw.data() + at, half ? 2 : 4);
        values.push_back(half ? from_bits(case_.dtype, bits) : number);
      }
      found.emplace_back(name, std::move(values));
    }
    return found;
  }

 private:
  struct Uploaded : loradash::cuda::TypedMatrix {
    const float* data_as_float() const { return static_cast<const float*>(data); }
  };

  static Numbers transposed(const Numbers& w, int64_t n, int64_t k) {
    Numbers out(w.size());
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) out[j * n + i] = w[i * k + j];
    return out;
  }

  Memory& fresh(size_t bytes) { return memory_.emplace_back(bytes); }
  void* scratch(size_t bytes) { return fresh(bytes).data(); }
  const void* halves(const Numbers& numbers) {
    std::vector<uint16_t> bits;
    for (float v : numbers) bits.push_back(to_bits(case_.dtype, v));
    Memory& memory = fresh(2 * bits.size());
    memory.put(bits.data(), 2 * bits.size());
    return memory.data();
  }
  Uploaded floats(const Numbers& numbers, size_t left_out = 0) {
    Memory& memory = fresh(4 * numbers.size());
    memory.put(numbers.data(), 4 * (numbers.size() - (numbers.empty() ? 0 : left_out)));
    return {{memory.data(), DType::kFloat32}};
  }
  void* result(const char* name, size_t bytes) {
    results_.push_back({name, memory_.size(), bytes});
    Memory& memory = fresh(bytes);
    memory.poison();
    return memory.data();
  }
  static void start(const std::vector<loradash::cuda::KernelLaunch>& launches) {
    const std::string failure = loradash::cuda::run(launches, nullptr);
    if (!failure.empty()) throw std::runtime_error(failure);
  }

  struct Result {
    std::string name;
    size_t index, bytes;
  };
  const Case& case_;
  std::vector<Memory> memory_;
  std::vector<Result> results_;
  loradash::cuda::Problem problem_{};
  loradash::cuda::ForwardOut forward_{};
  loradash::cuda::BackwardOut backward_{};
};

}  // namespace check
