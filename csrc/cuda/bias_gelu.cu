// C interface of bias and GELU; mathematics and kernels in bias_gelu.cuh.
#include "bias_gelu.cuh"

namespace {

// f(width of the vectors as a constant, the form as a constant).
template <class T, class F>
int by_form(bool vectors, int exact, F f) {
  using Vector = std::integral_constant<int, mx::kVector<T>>;
  using One = std::integral_constant<int, 1>;
  if (vectors) return exact ? f(Vector(), std::true_type()) : f(Vector(), std::false_type());
  return exact ? f(One(), std::true_type()) : f(One(), std::false_type());
}

}  // namespace

extern "C" int mx_cuda_bias_gelu_forward(int dtype, int weight_dtype, const void* x, const void* bias, void* y,
                                         int exact, int64_t rows, int64_t cols, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (rows == 0) return MX_OK;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors = cols % mx::kVector<T> == 0 && mx::aligned(x, bias, y);
    return by_form<T>(vectors, exact, [&](auto width, auto form) {
      return mx::launch_bias_gelu_forward<T, width(), form()>(x, mx::weights_of(bias, weight_dtype), y, rows, cols,
                                                              mx::stream_of(stream));
    });
  });
}

extern "C" int mx_cuda_bias_gelu_backward(int dtype, int weight_dtype, const void* dy, const void* x, const void* bias,
                                          void* dx, void* dbias, float* workspace, int64_t partitions, int exact,
                                          int64_t rows, int64_t cols, void* stream) {
  if (!mx::weight_dtype_ok(dtype, weight_dtype) || rows < 0 || !mx::columns_ok(cols)) return MX_BAD_ARGUMENT;
  if (dbias && (!mx::partitions_ok(partitions) || !workspace)) return MX_BAD_ARGUMENT;
  if (rows == 0 && !dbias) return MX_OK;
  return mx::by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool vectors = cols % mx::kVector<T> == 0 && mx::aligned(dy, x, bias, dx);
    return by_form<T>(vectors, exact, [&](auto width, auto form) {
      return mx::launch_bias_gelu_backward<T, width(), form()>(
          dy, x, mx::weights_of(bias, weight_dtype), dx, dbias, weight_dtype, dbias ? workspace : nullptr,
          dbias ? partitions : mx::kAnyPartitions, rows, cols, mx::stream_of(stream));
    });
  });
}
