// Python module of the emulated CUDA kernels: mx_cuda_ functions of common/abi.h, with addresses (and the stream, which
// nothing looks at) as integers, and what a test sets or asks of the machine.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "../../../csrc/common/abi.h"
#include "machine.h"
#include "shadow.h"

#ifdef MX_DECLARATIONS
MX_DECLARATIONS  // of functions that abi.h does not have
#endif

namespace py = pybind11;

namespace {

// A pointer is an address in Python.
template <class T>
using InPython = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <class T>
T from_python(InPython<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <class Result, class... P>
void define(py::module_& module, const char* name, Result (*function)(P...)) {
  module.def(name, [function](InPython<P>... values) { return function(from_python<P>(values)...); });
}

emulator::Order order_of(const std::string& name) {
  if (name == "forward") return emulator::Order::kForward;
  if (name == "reverse") return emulator::Order::kReverse;
  if (name == "random") return emulator::Order::kRandom;
  if (name == "record") return emulator::Order::kRecord;
  throw py::value_error("no such order: " + name);
}

py::tuple triple(const dim3& dimensions) { return py::make_tuple(dimensions.x, dimensions.y, dimensions.z); }

py::list recorded() {
  py::list all;
  for (const emulator::Launch& launch : emulator::take_recorded()) {
    py::list arguments;
    for (const std::string& bytes : launch.arguments) arguments.append(py::bytes(bytes));
    all.append(py::make_tuple(launch.kernel, triple(launch.grid), triple(launch.block), launch.dynamic_shared, arguments));
  }
  return all;
}

}  // namespace

PYBIND11_MODULE(MX_MODULE_NAME, module) {
  py::register_exception<emulator::Report>(module, "Report", PyExc_RuntimeError);
  module.def("configure", [](const std::string& order, unsigned seed) { emulator::configure(order_of(order), seed); });
  module.def("recorded", recorded);
  module.def("watch", [](const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>>& tensors) {
    std::vector<emulator::Region> regions;
    for (const auto& [begin, data, data_end, end] : tensors) regions.push_back({begin, data, data_end, end});
    emulator::watch_memory(regions);
  });
#define MX_DEFINE(NAME) define(module, #NAME, &mx_cuda_##NAME)
  MX_FUNCTIONS  // MX_DEFINE(...); for each function of the sources that are built in: the build knows which
}
