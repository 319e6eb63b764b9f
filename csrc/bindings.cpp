// The Python module `orepa_kernels._C`. Only this file depends on Python, which owns all memory and passes addresses as
// integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/api.h"
#ifdef OREPA_WITH_CUDA
#include "cuda/api.h"
#include "cuda/tile_shape.h"
#endif
#include "plan.h"

namespace py = pybind11;
using namespace orepa;

namespace {

void bind_cpu(py::module_& module) {
  module.def("cpu_instruction_set", &cpu::instruction_set);
  module.def("cpu_supports_type", [](int type) { return cpu::supports_type(static_cast<Type>(type)); });
  module.def(
      "cpu_forward",
      [](const Plan& plan, const Views& operands, const Views& kernel, int compute, int threads) {
        Block block = plan.bind(operands);
        block.kernel = view_at(kernel, 0);
        cpu::forward(block, {static_cast<Type>(compute), threads});
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "cpu_backward",
      [](const Plan& plan, const Views& operands, const Views& gradients, const Views& upstream, int compute,
         int threads) {
        Block block = plan.bind(operands, gradients);
        block.kernel = view_at(upstream, 0);
        cpu::backward(block, {static_cast<Type>(compute), threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

#ifdef OREPA_WITH_CUDA

void* pointer(std::int64_t address) {
  return reinterpret_cast<void*>(address);
}

std::vector<Block> bind_all(const std::vector<const Plan*>& plans, const std::vector<Views>& operands,
                            const std::vector<Views>& gradients, const Views& kernels) {
  if (operands.size() != plans.size() || (!gradients.empty() && gradients.size() != plans.size()) ||
      (!kernels.empty() && kernels.size() != view_fields * plans.size()))
    throw std::invalid_argument("every plan needs its operands, gradients and kernel: the lists differ in length");
  std::vector<Block> blocks;
  blocks.reserve(plans.size());
  for (std::size_t index = 0; index < plans.size(); ++index) {
    blocks.push_back(gradients.empty() ? plans[index]->bind(operands[index])
                                       : plans[index]->bind(operands[index], gradients[index]));
    if (!kernels.empty()) blocks.back().kernel = view_at(kernels, index);
  }
  return blocks;
}

void bind_cuda(py::module_& module) {
  module.attr("cuda_max_taps") = cuda::max_taps;
  module.def("cuda_architectures", &cuda::architectures);
  module.attr("cuda_requested_architectures") = OREPA_CUDA_ARCHS;
  module.def("cuda_unusable_reason", &cuda::unusable_reason);
  module.def("cuda_memory_needs", [](const std::vector<const Plan*>& plans, const std::vector<Views>& operands,
                                     bool backward) {
    const std::vector<Block> blocks = bind_all(plans, operands, {}, {});
    const cuda::MemoryNeeds needs = cuda::memory_needs(blocks.data(), static_cast<int>(blocks.size()), backward);
    return std::pair(needs.workspace_bytes, needs.counter_bytes);
  });
  module.def(
      "cuda_forward",
      [](const std::vector<const Plan*>& plans, const std::vector<Views>& operands, const Views& kernels, int device,
         std::uintptr_t stream, int precision) {
        const std::vector<Block> blocks = bind_all(plans, operands, {}, kernels);
        cuda::Context context;
        context.device = device;
        context.stream = stream;
        context.precision = static_cast<cuda::Precision>(precision);
        cuda::forward(blocks.data(), static_cast<int>(blocks.size()), context);
      },
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "cuda_backward",
      [](const std::vector<const Plan*>& plans, const std::vector<Views>& operands, const Views& upstream,
         const std::vector<Views>& gradients, int device, std::uintptr_t stream, int precision, std::int64_t workspace,
         std::int64_t workspace_bytes, std::int64_t counters, std::int64_t counter_bytes) {
        const std::vector<Block> blocks = bind_all(plans, operands, gradients, upstream);
        const cuda::Context context{device,
                                    stream,
                                    static_cast<cuda::Precision>(precision),
                                    pointer(workspace),
                                    workspace_bytes,
                                    pointer(counters),
                                    counter_bytes};
        cuda::backward(blocks.data(), static_cast<int>(blocks.size()), context);
      },
      py::call_guard<py::gil_scoped_release>());
}

#endif

// Return how this module was built.
py::dict build() {
  py::dict facts;
  facts["compiler"] = OREPA_COMPILER;
  facts["openmp"] = static_cast<bool>(OREPA_OPENMP);
  facts["cuda_compiler"] = OREPA_CUDA_COMPILER;
  facts["why_no_cuda"] = OREPA_WHY_NO_CUDA;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled kernels of orepa_kernels: see csrc/squeeze.h.";
  module.attr("max_terms") = max_terms;
  py::class_<Plan>(module, "Plan")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::pair<int, int>, const std::vector<Plan::TermFields>&,
                    int, int>());
  module.def("build", &build);
  bind_cpu(module);
#ifdef OREPA_WITH_CUDA
  bind_cuda(module);
#endif
}
