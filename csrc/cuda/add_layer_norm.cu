// C interface of the residual add with LayerNorm; mathematics in layer_norm_forward.cuh and layer_norm_backward.cuh.
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"

extern "C" int mx_cuda_add_layer_norm_forward(int dtype, int weight_dtype, const void* x, const void* x_bias,
                                              const void* residual, const void* weight, const void* bias, void* sum,
                                              void* y, float* mean, float* rstd, float dropout, const int64_t* seed,
                                              int64_t rows, int64_t cols, float eps, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (!weight || !bias || !mx::dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  if (rows == 0) return MX_OK;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return mx::launch_layer_norm_forward<T, true>(
        x, mx::weights_of(x_bias, weight_dtype), residual, mx::weights_of(weight, weight_dtype),
        mx::weights_of(bias, weight_dtype), sum, y, mean, rstd, mx::dropout_of(dropout), seed, rows, cols, eps,
        mx::stream_of(stream));
  });
}

extern "C" int mx_cuda_add_layer_norm_backward(int dtype, int weight_dtype, const void* dy, const void* dsum,
                                               const void* sum, const void* weight, const float* mean,
                                               const float* rstd, void* dresidual, void* dx, void* dweight, void* dbias,
                                               void* dx_bias, float* workspace, int64_t partitions, float dropout,
                                               const int64_t* seed, int64_t rows, int64_t cols, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (!mx::partitions_ok(partitions) || !weight || (rows > 0 && !mean)) return MX_BAD_ARGUMENT;
  if (!mx::dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  const mx::Dropout drop = mx::dropout_of(dropout);
  if (drop.threshold != 0 && !dx && rows > 0) return MX_BAD_ARGUMENT;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    mx::LayerNormBackward<T> a{};
    a.dy = static_cast<const T*>(dy);
    a.dsum = static_cast<const T*>(dsum);
    a.x = static_cast<const T*>(sum);
    a.weight = mx::weights_of(weight, weight_dtype);
    a.mean = mean;
    a.rstd = rstd;
    a.dx = static_cast<T*>(dresidual);
    a.dropped = static_cast<T*>(dx);
    a.workspace = workspace;
    a.sums = dx_bias ? 3 : 2;
    a.dropout = drop;
    a.seed = seed;
    a.rows = rows;
    a.cols = static_cast<int>(cols);
    void* const results[3] = {dweight, dbias, dx_bias};
    return mx::launch_layer_norm_backward<T, true>(a, weight_dtype, results, partitions, mx::stream_of(stream));
  });
}
