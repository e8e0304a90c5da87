// LayerNorm over the last dimension:
//
//   y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps)
//   dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat)),  g = dy * weight;  dweight = column sums of dy * x_hat, dbias of dy
//
// Layout: [rows, cols], row by row, any number of columns. Saved for the backward pass: x, mean and rstd.
// Threads have rows in the forward pass and groups of rows in the backward pass, whose sums are partial (column_sums.h).
#include "layer_norm.h"

namespace mx::cpu {
namespace {

template <class T>
struct Backward {
  const T* dy;
  const T* x;
  Weights weight;
  const float* mean;
  const float* rstd;
  T* dx;
  ColumnSums<2> sums;

  void run(mx_parallel_for executor) const {
    sums.gather(executor, kCheapGrain, [&](int64_t row, int64_t end, const auto& partial) {
      for (; row + 1 < end; row += 2) rows<2>(row, {from(row), from(row + 1)}, partial);
      if (row < end) rows<1>(row, {from(row)}, partial);
    });
  }

 private:
  RowStatistics from(int64_t row) const { return {mean[row], rstd[row]}; }

  template <int R>
  MX_INLINE void rows(int64_t row, const RowStatistics (&from)[R], const std::array<float*, 2>& partial) const {
    const int64_t cols = sums.cols, first = row * cols;
    T* const to = dx + first;
    backward_rows<R>(dy + first, x + first, from, weight, cols, partial[0], partial[1],
                     [&](int r, int64_t c, auto lanes, Floats d) { store(to + r * cols + c, d, lanes); });
  }
};

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int64_t mx_cpu_partitions(int64_t rows, int64_t) {
  int64_t partitions = 1;
  while (partitions < kMaxPartitions && partitions * partitions < rows) ++partitions;
  return partitions;
}

extern "C" int mx_cpu_layer_norm_forward(int dtype, int weight_dtype, const void* x, const void* weight, const void* bias,
                                         void* y, float* mean, float* rstd, int64_t rows, int64_t cols, float eps,
                                         mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !weight || !bias) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Weights scale = weights_of(weight, weight_dtype), offset = weights_of(bias, weight_dtype);
    parallel(executor, rows, row_grain(cols, kCheapGrain), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const RowStatistics of = normalize_row(at<T>(x, row * cols), scale, offset, at<T>(y, row * cols), cols, eps);
        mean[row] = of.mean;
        rstd[row] = of.rstd;
      }
    });
  });
}

extern "C" int mx_cpu_layer_norm_backward(int dtype, int weight_dtype, const void* dy, const void* x,
                                          const void* weight, const float* mean, const float* rstd, void* dx, void* dweight,
                                          void* dbias, float* workspace, int64_t partitions, int64_t rows, int64_t cols,
                                          mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !partitions_ok(partitions)) return MX_BAD_ARGUMENT;
  if (rows > 0 && (!weight || !mean)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const ColumnSums<2> sums{workspace, partitions, rows, cols};
    const Backward<T> backward{at<T>(dy, 0), at<T>(x, 0), weights_of(weight, weight_dtype), mean, rstd, at<T>(dx, 0), sums};
    backward.run(executor);
    const bool wide = weight_dtype == MX_FLOAT32;
    sums.template finish<T>(executor, 0, dweight, wide);
    sums.template finish<T>(executor, 1, dbias, wide);
  });
}
