// pyquant._C: importing it loads the op library. Tensors go through torch.ops.pyquant, never through this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Loads pyquant's op library and answers questions about its build.";
  module.def("version", &pyquant::version);
  module.def("cpu_isa", &pyquant::cpu_isa,
             "The instruction set the CPU kernels use: 'portable', 'avx2', 'avx512' or 'amx'.");
  module.def("set_cpu_isa", &pyquant::set_cpu_isa, py::arg("name"),
             "Makes the CPU kernels use another instruction set. Raises ValueError for one this processor lacks.");
  module.def("cuda_version", &pyquant::cuda_version, "The CUDA toolkit the kernels were built with, or ''.");
  module.def("cuda_archs", &pyquant::cuda_archs, "The GPU architectures the kernels were built for, or ''.");
  module.def("cuda_devices", &pyquant::cuda_devices, "The GPUs that the CUDA runtime sees.");
  module.def("explain_plan", &pyquant::explain_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
             py::arg("rank"), py::arg("dropout"), py::arg("blocksize"), py::arg("direction"), py::arg("arch"),
             py::arg("sm_count"), "The kernel and tiles that a 4-bit linear would run with on a GPU.");
  py::class_<pyquant::DeviceInfo>(module, "DeviceInfo")
      .def_readonly("name", &pyquant::DeviceInfo::name)
      .def_readonly("major", &pyquant::DeviceInfo::major)
      .def_readonly("minor", &pyquant::DeviceInfo::minor)
      .def_readonly("multiprocessors", &pyquant::DeviceInfo::multiprocessors)
      .def_readonly("memory_bytes", &pyquant::DeviceInfo::memory_bytes)
      .def_readonly("l2_bytes", &pyquant::DeviceInfo::l2_bytes)
      .def_readonly("shared_memory_per_block", &pyquant::DeviceInfo::shared_memory_per_block);
}
