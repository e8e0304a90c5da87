// Bias and GELU: y = gelu(v), v = x + bias,
//
//   tanh form   gelu(v) = v * s(z),     s = logistic function, z = 2 sqrt(2 / pi) (v + 0.044715 v^3)
//               gelu'(v) = s + v * s * (1 - s) * dz/dv
//   exact       gelu(v) = v * Phi(v) = max(v, 0) - |v| * Phi(-|v|),   Phi = cumulative normal distribution
//               gelu'(v) = Phi + v * density(v)
//
// (0.5 v (1 + tanh(z / 2)) is v * s(z), which does not cancel where v is negative.) Layout: [rows, cols], row by row. Saved:
// x; nothing of what lies between is ever in memory. Threads have rows in the forward pass, groups of rows with partial sums
// of dbias in the backward pass.
#include "column_sums.h"
#include "elementary.h"

namespace mx::cpu {
namespace {

constexpr float kSlope = 1.5957691216f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

// The cubic's argument: beyond 20 the logistic function is 0 or 1 in float32, and no square overflows.
MX_INLINE Floats within(Floats v) { return maximum(broadcast(-20.f), minimum(broadcast(20.f), v)); }

template <bool EXACT>
MX_INLINE Floats gelu(Floats v) {
  if constexpr (EXACT) return maximum(v, Floats{}) - normal_tail_times(absolute(v));
  const Floats inner = within(v);
  return v * logistic(kSlope * (inner + kCubic * (inner * inner * inner))).value;
}

template <bool EXACT>
MX_INLINE Floats gelu_slope(Floats v) {
  if constexpr (EXACT) return normal_slope(v);
  const Floats inner = within(v), square = inner * inner;
  const Logistic of = logistic(kSlope * (inner + kCubic * (square * inner)));
  return of.value + inner * (of.value * of.complement) * (kSlope + 3.f * kSlope * kCubic * square);
}

template <class T, bool EXACT>
void forward(const T* x, const Weights& bias, T* y, int64_t rows, int64_t cols, mx_parallel_for executor) {
  parallel(executor, rows, row_grain(cols, kDearGrain), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * cols; first < end * cols; first += cols)
      for_vectors(cols, [&](int64_t c, auto lanes, int) {
        store(y + first + c, gelu<EXACT>(load(x + first + c, lanes) + load_weights<T>(bias, c, lanes)), lanes);
      });
  });
}

template <class T, bool EXACT>
void backward(const T* dy, const T* x, const Weights& bias, T* dx, bool has_dbias, const ColumnSums<1>& sums,
              mx_parallel_for executor) {
  const int64_t cols = sums.cols;
  sums.gather(executor, kDearGrain, [&](int64_t row, int64_t end, const std::array<float*, 1>& partial) {
    float* const dbias = partial[0];
    for (int64_t first = row * cols; first < end * cols; first += cols)
      for_vectors(cols, [&](int64_t c, auto lanes, int) {
        const Floats v = load(x + first + c, lanes) + load_weights<T>(bias, c, lanes);
        const Floats d = load(dy + first + c, lanes) * gelu_slope<EXACT>(v);
        store(dx + first + c, d, lanes);
        if (has_dbias) store(dbias + c, load(dbias + c, lanes) + d, lanes);
      });
  });
}

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_bias_gelu_forward(int dtype, int weight_dtype, const void* x, const void* bias, void* y, int exact,
                                        int64_t rows, int64_t cols, mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Weights offset = weights_of(bias, weight_dtype);
    if (exact) return forward<T, true>(at<T>(x, 0), offset, at<T>(y, 0), rows, cols, executor);
    forward<T, false>(at<T>(x, 0), offset, at<T>(y, 0), rows, cols, executor);
  });
}

extern "C" int mx_cpu_bias_gelu_backward(int dtype, int weight_dtype, const void* dy, const void* x, const void* bias,
                                         void* dx, void* dbias, float* workspace, int64_t partitions, int exact,
                                         int64_t rows, int64_t cols, mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !partitions_ok(partitions)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Weights offset = weights_of(bias, weight_dtype);
    const ColumnSums<1> sums{workspace, partitions, rows, cols};
    const auto run = exact ? backward<T, true> : backward<T, false>;
    run(at<T>(dy, 0), at<T>(x, 0), offset, at<T>(dx, 0), dbias != nullptr, sums, executor);
    sums.template finish<T>(executor, 0, dbias, weight_dtype == MX_FLOAT32);
  });
}
