// C interface of bias, dropout and the residual add; mathematics and kernels in bias_dropout_add.cuh.
#include "bias_dropout_add.cuh"

extern "C" int mx_cuda_bias_dropout_add_forward(int dtype, int weight_dtype, const void* x, const void* bias,
                                                const void* residual, void* y, float dropout, const int64_t* seed,
                                                int64_t rows, int64_t cols, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (!mx::dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  if (rows == 0) return MX_OK;
  const mx::Weights offset = mx::weights_of(bias, weight_dtype);
  const mx::Dropout drop = mx::dropout_of(dropout);
  const cudaStream_t on = mx::stream_of(stream);
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (cols % mx::kVector<T> == 0 && mx::aligned(x, bias, residual, y))
      return mx::launch_bias_dropout_add_forward<T, mx::kVector<T>>(x, offset, residual, y, drop, seed, rows, cols, on);
    return mx::launch_bias_dropout_add_forward<T, 1>(x, offset, residual, y, drop, seed, rows, cols, on);
  });
}

extern "C" int mx_cuda_bias_dropout_add_backward(int dtype, int weight_dtype, const void* dy, void* dx, void* dbias,
                                                 float* workspace, int64_t partitions, float dropout,
                                                 const int64_t* seed, int64_t rows, int64_t cols, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (!mx::dropout_ok(dropout, seed) || (dbias && (!mx::partitions_ok(partitions) || !workspace)))
    return MX_BAD_ARGUMENT;
  const mx::Dropout drop = mx::dropout_of(dropout);
  if (drop.threshold != 0 && !dx && rows > 0) return MX_BAD_ARGUMENT;
  if (!dbias && (rows == 0 || drop.threshold == 0)) return MX_OK;
  const cudaStream_t on = mx::stream_of(stream);
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (cols % mx::kVector<T> == 0 && mx::aligned(dy, dx))
      return mx::launch_bias_dropout_add_backward<T, mx::kVector<T>>(dy, dx, dbias, weight_dtype, workspace, partitions,
                                                                     drop, seed, rows, cols, on);
    return mx::launch_bias_dropout_add_backward<T, 1>(dy, dx, dbias, weight_dtype, workspace, partitions, drop, seed,
                                                      rows, cols, on);
  });
}
