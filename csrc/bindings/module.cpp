// The Python module rebased_cuda._C: facts about the build. Tensors never pass here (library.cpp).
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "op/backend.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(REBASED_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = REBASED_CUDA_VERSION;
  info["cuda_architectures"] = REBASED_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_version"] = "";
  info["cuda_architectures"] = "";
#endif
#if defined(REBASED_EMULATOR)
  info["emulator"] = true;
#else
  info["emulator"] = false;
#endif
  info["torch_version"] = REBASED_TORCH_VERSION;  // built against; any torch from 2.11 on will do
  info["compiler"] = REBASED_COMPILER;
  info["cpu_instruction_set"] = rebased::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What was built, and how a problem would be launched.";
  module.def("build_info", &build_info, "Facts about this build as a dict.");
}
