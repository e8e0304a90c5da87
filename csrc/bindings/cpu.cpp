// The operators on the CPU: kernels of csrc/cpu on torch's threads.
#define MX_DEVICE "cpu"
#define MX_KERNEL(NAME) mx_cpu_##NAME
#define MX_DISPATCH_KEY CPU

#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/abi.h"

namespace mx_bindings {

struct Place {
  explicit Place(const torch::stable::Tensor&) {}
  static bool holds(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
  static std::string failure(int status) { return "the kernel returned " + std::to_string(status); }
  mx_parallel_for resource() const { return &run; }

 private:
  static void run(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  }
};

}  // namespace mx_bindings

#include "operators.h"
