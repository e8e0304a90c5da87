// C interface of LayerNorm; the kernels and their mathematics are in layer_norm_forward.cuh and layer_norm_backward.cuh.
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"

extern "C" int mx_cuda_layer_norm_forward(int dtype, int weight_dtype, const void* x, const void* weight,
                                          const void* bias, void* y, float* mean, float* rstd, int64_t rows,
                                          int64_t cols, float eps, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (!weight || !bias) return MX_BAD_ARGUMENT;
  if (rows == 0) return MX_OK;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return mx::launch_layer_norm_forward<T, false>(
        x, mx::Weights{nullptr, 0}, nullptr, mx::weights_of(weight, weight_dtype), mx::weights_of(bias, weight_dtype),
        nullptr, y, mean, rstd, mx::Dropout{0, 1.f}, nullptr, rows, cols, eps, mx::stream_of(stream));
  });
}

extern "C" int mx_cuda_layer_norm_backward(int dtype, int weight_dtype, const void* dy, const void* x,
                                           const void* weight, const float* mean, const float* rstd, void* dx,
                                           void* dweight, void* dbias, float* workspace, int64_t partitions,
                                           int64_t rows, int64_t cols, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (!mx::partitions_ok(partitions) || !weight || (rows > 0 && !mean)) return MX_BAD_ARGUMENT;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    mx::LayerNormBackward<T> a{};
    a.dy = static_cast<const T*>(dy);
    a.x = static_cast<const T*>(x);
    a.weight = mx::weights_of(weight, weight_dtype);
    a.mean = mean;
    a.rstd = rstd;
    a.dx = static_cast<T*>(dx);
    a.workspace = workspace;
    a.sums = 2;
    a.rows = rows;
    a.cols = static_cast<int>(cols);
    void* const results[3] = {dweight, dbias, nullptr};
    return mx::launch_layer_norm_backward<T, false>(a, weight_dtype, results, partitions, mx::stream_of(stream));
  });
}
