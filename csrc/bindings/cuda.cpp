// The operators on CUDA devices, on the stream that torch has made current there.
//
// Loads beside a CPU build of torch too: the one function that only a CUDA build has is declared weak.
#define MX_DEVICE "cuda"
#define MX_KERNEL(NAME) mx_cuda_##NAME
#define MX_DISPATCH_KEY CUDA

#include <stdexcept>
#include <string>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/abi.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// What a status above 0 means, for callers without torch too. Static storage.
extern "C" __attribute__((visibility("default"))) const char* mx_cuda_error(int status) {
  switch (status) {
    case cudaErrorInsufficientDriver:
      return "there is no NVIDIA driver here, or it is too old for the CUDA version of the kernels (update the driver)";
    case cudaErrorNoKernelImageForDevice:
      return "the kernels were not built for this device (run `megatron-ext kernels build --cuda --force` on it)";
    default: return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}

namespace mx_bindings {

class Place {
 public:
  explicit Place(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      throw std::runtime_error("megatron_ext: this build of torch has no CUDA; install one that has");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  static bool holds(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }
  static std::string failure(int status) {
    return "CUDA error " + std::to_string(status) + ": " + mx_cuda_error(status);
  }
  void* resource() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace mx_bindings

#include "operators.h"
