// The CUDA kernels from C++, without PyTorch: every entry of the list of tiles and every pass, forward and backward,
// against plain loops. Made for compute-sanitizer. CMake builds it, or one line:
//
//   nvcc -std=c++20 -O2 -arch=sm_90 -Icsrc examples/cuda_check.cpp examples/cuda_check/planted.cu
//     csrc/cuda/*.cu csrc/cuda/*.cpp csrc/cuda/plan/*.cpp -o cuda_check
//
//   cuda_check [--list] [--only TEXT] [--plant write|uninit|race|sync]
//
// --list         names every case and the launches that it takes, and runs nothing
// --only TEXT    takes the case of this name, or those whose names contain TEXT
// --plant FAULT  runs one case, or one small kernel, with a fault that a tool of compute-sanitizer must find: memcheck
//                the write, initcheck the uninitialised read, racecheck the race, synccheck the barrier. Without a tool
//                nothing notices it, and the exit code is 0.
//
// Without a card it lists the launches that an A100 would take. Exit codes: 0, all is right; 1, a result is wrong, a
// launch failed, or a kernel of this build has no case; 2, the arguments are.
#include <cstdio>
#include <set>

#include "cuda_check/card.h"
#include "cuda_check/cases.h"
#include "cuda_check/plain.h"
#include "cuda_check/planted.h"

namespace {

using namespace check;
using loradash::cuda::Card;
using loradash::cuda::KernelLaunch;

struct Options {
  bool list = false;
  std::string only;
  Plant plant = Plant::kNone;
};

bool parse(int count, char** arguments, Options& options) {
  const std::pair<const char*, Plant> plants[] = {
      {"write", Plant::kWrite}, {"uninit", Plant::kUninitialised}, {"race", Plant::kRace}, {"sync", Plant::kSync}};
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    if (word == "--list") {
      options.list = true;
    } else if (word == "--only" && !value.empty()) {
      options.only = value, ++i;
    } else if (word == "--plant") {
      for (const auto& [name, plant] : plants)
        if (value == name) options.plant = plant;
      if (options.plant == Plant::kNone) return false;
      ++i;
    } else {
      return false;
    }
  }
  return true;
}

// The launches of a case, forward then backward, planned with pointers that are not followed.
std::vector<KernelLaunch> launches(const Case& c, Card card) {
  using namespace loradash::cuda;
  alignas(256) static char somewhere[256];
  const auto matrix = [](int64_t count) { return TypedMatrix{count ? somewhere : nullptr, DType::kFloat32}; };
  auto* const numbers = reinterpret_cast<float*>(somewhere);
  const auto [m, k, n] = c.shape;
  if (c.processors) card.processors = c.processors;
  Problem problem{};
  problem.shape = c.shape, problem.dtype = c.dtype, problem.x = somewhere, problem.ldx = k, problem.card = card;
  problem.weight = {c.weight == Layout::kNone ? nullptr : somewhere, k, 1};
  if (c.weight == Layout::kColumns) problem.weight.stride_n = 1, problem.weight.stride_k = n;
  problem.adapters = {matrix(c.rank), matrix(c.rank), matrix(c.directions), matrix(c.directions),
                      numbers,        c.rank,         c.directions,         1.0f};
  if (c.threshold()) problem.dropout = {reinterpret_cast<int64_t*>(somewhere), c.threshold()};
  const ForwardOut forward{c.base ? nullptr : somewhere, c.base ? somewhere : nullptr, somewhere, numbers};
  const BackwardOut backward{somewhere,
                             n,
                             numbers,
                             somewhere,
                             c.rank ? numbers : nullptr,
                             c.rank ? numbers : nullptr,
                             c.directions ? numbers : nullptr,
                             c.base ? nullptr : numbers};
  std::vector<KernelLaunch> found = plan_forward(problem, forward, nullptr, c.tile).launches;
  for (KernelLaunch& l : plan_backward(problem, backward, nullptr, c.tile).launches) found.push_back(std::move(l));
  return found;
}

void list(const Case& c, const Card& card) {
  std::printf("%s\n", c.name.c_str());
  for (const KernelLaunch& l : launches(c, card))
    std::printf("  %s %u %u %u threads %u shared %u\n", l.kernel.c_str(), l.grid[0], l.grid[1], l.grid[2], l.threads,
                l.shared_bytes);
}

// Returns how many kernels of this build no case launches, and names them.
int without_case(const std::vector<Case>& cases, const Card& card) {
  std::set<std::string> launched;
  for (const Case& c : cases)
    for (const KernelLaunch& l : launches(c, card)) launched.insert(l.kernel);
  int missing = 0;
  for (const auto& table : {loradash::cuda::forward_kernels(), loradash::cuda::backward_kernels()})
    for (const auto& [name, kernel] : table)
      if (!launched.count(name)) std::printf("no case launches %s\n", name), ++missing;
  return missing;
}

// Runs a case and returns whether every result is near enough to the plain loops'.
bool right(const Case& c, const Card& card) {
  const Inputs in(c);
  const std::vector<Expected> expected = plain(c, in);
  bool all = true;
  double most = 0;
  for (const auto& [name, values] : Call(c, in, card, Plant::kNone).run()) {
    for (const Expected& wanted : expected) {
      if (wanted.name != name) continue;
      for (size_t i = 0; i < wanted.values.size(); ++i) {
        const double share = std::fabs(values[i] - wanted.values[i]) / wanted.allowed[i];
        most = std::fmax(most, share);
        // A comparison that NaN fails, too.
        if (share <= 1) continue;
        std::printf("%s: %s[%zu] is %g, not %g (%g allowed)\n", c.name.c_str(), name.c_str(), i, values[i],
                    wanted.values[i], wanted.allowed[i]);
        all = false;
        break;
      }
    }
  }
  std::printf("%s %s, at most %.2f of what is allowed\n", all ? "ok" : "WRONG", c.name.c_str(), most);
  return all;
}

// The case of this name, or all whose names contain it: that of one tile may be a part of another's.
std::vector<Case> choose(const std::vector<Case>& all, const std::string& only) {
  std::vector<Case> found;
  for (const Case& c : all) {
    if (c.name == only) return {c};
    if (c.name.find(only) != std::string::npos) found.push_back(c);
  }
  return found;
}

int planted(const Options& options, const Case& c, const Card& card) {
  std::printf("planted; compute-sanitizer must find it\n");
  if (options.plant == Plant::kRace) plant_race();
  if (options.plant == Plant::kSync) plant_sync();
  if (options.plant == Plant::kWrite || options.plant == Plant::kUninitialised)
    (void)Call(c, Inputs(c), card, options.plant).run();
  return 0;
}

int check_all(const Options& options) {
  int cards = 0;
  const cudaError_t error = cudaGetDeviceCount(&cards);
  const bool has_card = error == cudaSuccess && cards > 0;
  // These say that there is no card, or no driver that knows one; any other is an error of the card that there is.
  if (error != cudaErrorNoDevice && error != cudaErrorInsufficientDriver) expect(error, "looking for a card");
  Card card{108, 163 * 1024};
  if (has_card) {
    expect(cudaDeviceGetAttribute(&card.processors, cudaDevAttrMultiProcessorCount, 0), "processors");
    expect(cudaDeviceGetAttribute(&card.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "shared memory");
  }
  const std::vector<Case> all = Cases(card).all;
  const std::vector<Case> chosen = choose(all, options.only);
  if (chosen.empty()) {
    std::printf("no case is named like '%s'\n", options.only.c_str());
    return 2;
  }
  if (has_card && options.plant != Plant::kNone) return planted(options, chosen.front(), card);
  int bad = options.only.empty() ? without_case(all, card) : 0;
  if (!has_card) std::printf("no card (%s): the launches that an A100 would take\n", cudaGetErrorString(error));
  for (const Case& c : chosen) {
    if (options.list || !has_card)
      list(c, card);
    else
      bad += !right(c, card);
  }
  std::printf("%zu cases, %d bad\n", chosen.size(), bad);
  return bad ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  if (!parse(count, arguments, options)) {
    std::printf("cuda_check [--list] [--only TEXT] [--plant write|uninit|race|sync]\n");
    return 2;
  }
  try {
    return check_all(options);
  } catch (const std::exception& error) {
    std::printf("failed: %s\n", error.what());
    return 1;
  }
}
