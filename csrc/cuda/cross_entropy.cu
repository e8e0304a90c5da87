// C interface of the vocabulary-parallel cross-entropy; mathematics and kernels in cross_entropy.cuh.
#include "cross_entropy.cuh"

namespace {

int check(int64_t first, int64_t real, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 0 || real < 0 || real > cols || first < 0) return MX_BAD_ARGUMENT;
  return rows > mx::kMaxGrid ? MX_UNSUPPORTED : MX_OK;
}

}  // namespace

extern "C" int mx_cuda_cross_entropy_forward(int dtype, const void* logits, const int64_t* labels, float* maximum,
                                             float* total, float* target, int64_t first, int64_t real, int64_t rows,
                                             int64_t cols, void* stream) {
  const int status = check(first, real, rows, cols);
  if (status != MX_OK || rows == 0) return status;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    MX_LAUNCH((mx::cross_entropy_forward_kernel<T>), dim3(static_cast<unsigned>(rows)), dim3(mx::kEntropyBlock), 0,
              mx::stream_of(stream), static_cast<const T*>(logits), labels, maximum, total, target, first, real, cols);
    return MX_LAST_ERROR();
  });
}

extern "C" int mx_cuda_cross_entropy_backward(int dtype, void* logits, const int64_t* labels, const float* maximum,
                                              const float* total, const float* grad, int64_t first, int64_t real,
                                              int64_t rows, int64_t cols, void* stream) {
  const int status = check(first, real, rows, cols);
  if (status != MX_OK || rows == 0 || cols == 0) return status;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    MX_LAUNCH((mx::cross_entropy_backward_kernel<T>), dim3(static_cast<unsigned>(rows)), dim3(mx::kEntropyBlock), 0,
              mx::stream_of(stream), static_cast<T*>(logits), labels, maximum, total, grad, first, real, cols);
    return MX_LAST_ERROR();
  });
}
