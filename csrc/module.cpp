// The Python module: tells `doctor` (internlm2_kernels/__main__.py) and the tests about the build and the process.
// Operators are registered in their own files.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime.h"
#include "types.h"

namespace py = pybind11;
using namespace internlm2;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of internlm2_kernels; import torch first.";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = INTERNLM2_BUILD_TORCH;
#ifdef INTERNLM2_CUDA_ARCHS
    info["cuda"] = INTERNLM2_CUDA_ARCHS;
#else
    info["cuda"] = "";
#endif
    return info;
  }, "Compiler, torch version at build time, and the CUDA architectures (empty: built without nvcc).");
  m.def("cpu_isa", [] { return std::string(isa_name(isa())); },
        "The instruction set in use: amx, avx512_bf16, avx512, avx2 or '' (none).");
  m.def("best_cpu_isa", [] { return std::string(isa_name(best_isa())); }, "The best instruction set of this processor.");
  m.def("set_cpu_isa", [](const std::string& name) {
    if (!set_isa(name)) {
      throw py::value_error("set_cpu_isa: name: expected an instruction set that this processor and system permit (best: '" +
                            std::string(isa_name(best_isa())) + "'), got '" + name + "'");
    }
  }, py::arg("name"), "Forces an instruction set in this process. Kernels that have no build for it use the next lower one.");
  m.def("set_error_word", [](int device, uintptr_t word) { set_error_word(device, reinterpret_cast<int*>(word)); },
        py::arg("device"), py::arg("word"),
        "Sets the address of the int32 on a CUDA device in which kernels record a bad index.");
  m.def("set_error_word_maker", [](py::function maker) {
    auto* kept = new py::function(std::move(maker));  // never freed: the interpreter ends before this library does
    set_error_word_maker([kept](int device) {
      py::gil_scoped_acquire gil;
      (*kept)(device);
    });
  }, py::arg("maker"), "maker(device) is called when a kernel needs the error word of a device that has none, and sets it.");
  m.def("device_errors", [] {
    return std::map<std::string, int>{{"qkv_rope: positions", kQkvRopePositions}, {"qkv_rope: cache.slots", kQkvRopeSlots}};
  }, "The bits of the error word that the compiled kernels set.");
  m.def("signatures", [] { return signatures(); },
        "The C++ signature of every registered overload, for tests to compare with the schemas.");
}
