// Residual add with LayerNorm after it, and optional bias and dropout before it:
//
//   sum = residual + dropout(x + x_bias),  y = layer_norm(sum)
//   dresidual = dsum + d layer_norm,  dx = dropout'(dresidual),  dx_bias = column sums of dx
//
// Layout: [rows, cols], row by row. y is made of the sum as it is stored, which is what the backward pass sees. Saved: sum,
// mean, rstd; the dropout mask is drawn again from the seed. Threads have rows, or groups of rows, as in layer_norm.cpp.
#include "layer_norm.h"
#include "noise.h"

namespace mx::cpu {
namespace {

// One row of sum.
template <class T>
MX_INLINE void add_row(const T* x, const Weights& x_bias, const T* residual, T* sum, int64_t cols) {
  for_vectors(cols, [&](int64_t c, auto lanes, int) {
    store(sum + c, load(residual + c, lanes) + (load(x + c, lanes) + load_weights<T>(x_bias, c, lanes)), lanes);
  });
}

template <class T>
MX_INLINE void add_dropped_row(const T* x, const Weights& x_bias, const T* residual, T* sum, int64_t cols, Noise& noise,
                               int64_t first) {
  for_dropped(noise, first, cols, [&](int64_t c, auto lanes, Floats factor) {
    const Floats value = load(x + c, lanes) + load_weights<T>(x_bias, c, lanes);
    store(sum + c, load(residual + c, lanes) + value * factor, lanes);
  });
}

template <class T>
struct Backward {
  const T* dy;
  const T* dsum;
  const T* sum;
  Weights weight;
  const float* mean;
  const float* rstd;
  T* dresidual;
  T* dx;
  bool has_x_bias;
  float dropout;
  const int64_t* seed;
  ColumnSums<3> sums;

  void run(mx_parallel_for executor) const {
    sums.gather(executor, dx ? kDearGrain : kCheapGrain, [&](int64_t row, int64_t end, const auto& partial) {
      Noise noise(dropout, seed);
      for (; row + 1 < end; row += 2) rows<2>(row, {from(row), from(row + 1)}, partial, noise);
      if (row < end) rows<1>(row, {from(row)}, partial, noise);
    });
  }

 private:
  RowStatistics from(int64_t row) const { return {mean[row], rstd[row]}; }

  template <int R>
  MX_INLINE void rows(int64_t row, const RowStatistics (&from)[R], const std::array<float*, 3>& partial, Noise& noise) const {
    const int64_t cols = sums.cols, first = row * cols;
    T* const to = dresidual + first;
    const T* const more = dsum ? dsum + first : nullptr;
    backward_rows<R>(dy + first, sum + first, from, weight, cols, partial[0], partial[1],
                     [&](int r, int64_t c, auto lanes, Floats d) {
                       if (more) d += load(more + r * cols + c, lanes);
                       store(to + r * cols + c, d, lanes);
                     });
    for (int r = 0; r < R; ++r) finish_row(first + r * cols, partial[2], noise);
  }

  // dx and its share of dx_bias, from the row of dresidual that begins at element `first`.
  MX_INLINE void finish_row(int64_t first, float* dx_bias, Noise& noise) const {
    const T* const from = dresidual + first;
    const auto add = [&](int64_t c, auto lanes, Floats d) { store(dx_bias + c, load(dx_bias + c, lanes) + d, lanes); };
    if (dx) {
      for_dropped(noise, first, sums.cols, [&](int64_t c, auto lanes, Floats factor) {
        const Floats d = load(from + c, lanes) * factor;
        store(dx + first + c, d, lanes);
        if (has_x_bias) add(c, lanes, d);
      });
    } else if (has_x_bias) {
      for_vectors(sums.cols, [&](int64_t c, auto lanes, int) { add(c, lanes, load(from + c, lanes)); });
    }
  }
};

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_add_layer_norm_forward(int dtype, int weight_dtype, const void* x, const void* x_bias,
                                             const void* residual, const void* weight, const void* bias, void* sum, void* y,
                                             float* mean, float* rstd, float dropout, const int64_t* seed, int64_t rows,
                                             int64_t cols, float eps, mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !weight || !bias) return MX_BAD_ARGUMENT;
  if (!dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Weights scale = weights_of(weight, weight_dtype), offset = weights_of(bias, weight_dtype);
    const Weights before = weights_of(x_bias, weight_dtype);
    const bool drops = dropout > 0.f;
    parallel(executor, rows, row_grain(cols, drops ? kDearGrain : kCheapGrain), [&](int64_t begin, int64_t end) {
      Noise noise(dropout, seed);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * cols;
        T* const added = at<T>(sum, first);
        if (drops) {
          add_dropped_row(at<T>(x, first), before, at<T>(residual, first), added, cols, noise, first);
        } else {
          add_row(at<T>(x, first), before, at<T>(residual, first), added, cols);
        }
        const RowStatistics of = normalize_row<T>(added, scale, offset, at<T>(y, first), cols, eps);
        mean[row] = of.mean;
        rstd[row] = of.rstd;
      }
    });
  });
}

extern "C" int mx_cpu_add_layer_norm_backward(int dtype, int weight_dtype, const void* dy, const void* dsum, const void* sum,
                                              const void* weight, const float* mean, const float* rstd, void* dresidual,
                                              void* dx, void* dweight, void* dbias, void* dx_bias, float* workspace,
                                              int64_t partitions, float dropout, const int64_t* seed, int64_t rows,
                                              int64_t cols, mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !partitions_ok(partitions)) return MX_BAD_ARGUMENT;
  if (!weight || !dropout_ok(dropout, seed) || (dropout > 0.f && !dx)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const ColumnSums<3> sums{workspace, partitions, rows, cols};
    const Backward<T> backward{at<T>(dy, 0), at<T>(dsum, 0), at<T>(sum, 0), weights_of(weight, weight_dtype), mean, rstd,
                               at<T>(dresidual, 0), dropout > 0.f ? at<T>(dx, 0) : nullptr, dx_bias != nullptr, dropout, seed,
                               sums};
    backward.run(executor);
    const bool wide = weight_dtype == MX_FLOAT32;
    sums.template finish<T>(executor, 0, dweight, wide);
    sums.template finish<T>(executor, 1, dbias, wide);
    sums.template finish<T>(executor, 2, dx_bias, wide);
  });
}
