// The Python module: facts about the build. What the two devices offer is defined beside their operators.
#include <torch/csrc/utils/pybind.h>

namespace loradash {

namespace cpu {
void define_cpu(pybind11::module_& m);
}
namespace cuda {
void define_cuda(pybind11::module_& m);
}

PYBIND11_MODULE(_C, m) {
  m.def("compiler", [] { return __VERSION__; });
#ifdef _OPENMP
  m.attr("parallel") = true;
#else
  // Without OpenMP at::parallel_for is a serial loop.
  m.attr("parallel") = false;
#endif
  cpu::define_cpu(m);
  cuda::define_cuda(m);
}

}  // namespace loradash
