// Bias, dropout and residual add:
//
//   y = residual + dropout(x + bias);  dx = dropout'(dy),  dbias = column sums of dx
//
// Layout: [rows, cols], row by row. Nothing is saved: the backward pass draws the mask again from the seed. Threads have rows
// in the forward pass, groups of rows with partial sums in the backward pass.
#include "column_sums.h"
#include "noise.h"

namespace mx::cpu {
namespace {

// One row of y.
template <class T, bool DROPS>
MX_INLINE void forward_row(const T* x, const Weights& bias, const T* residual, T* y, int64_t cols, Noise& noise,
                           int64_t first) {
  const auto value = [&](int64_t c, auto lanes) { return load(x + c, lanes) + load_weights<T>(bias, c, lanes); };
  if constexpr (DROPS) {
    for_dropped(noise, first, cols, [&](int64_t c, auto lanes, Floats factor) {
      store(y + c, load(residual + c, lanes) + value(c, lanes) * factor, lanes);
    });
  } else {
    for_vectors(cols, [&](int64_t c, auto lanes, int) { store(y + c, load(residual + c, lanes) + value(c, lanes), lanes); });
  }
}

// One row of dx (null: it is dy) and its share of dbias (null: nobody wants it).
template <class T, bool DROPS>
MX_INLINE void backward_row(const T* dy, T* dx, float* dbias, int64_t cols, Noise& noise, int64_t first) {
  const auto add = [&](int64_t c, auto lanes, Floats d) {
    if (dbias) store(dbias + c, load(dbias + c, lanes) + d, lanes);
  };
  if constexpr (DROPS) {
    for_dropped(noise, first, cols, [&](int64_t c, auto lanes, Floats factor) {
      const Floats d = load(dy + c, lanes) * factor;
      store(dx + c, d, lanes);
      add(c, lanes, d);
    });
  } else {
    for_vectors(cols, [&](int64_t c, auto lanes, int) { add(c, lanes, load(dy + c, lanes)); });
  }
}

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_bias_dropout_add_forward(int dtype, int weight_dtype, const void* x, const void* bias,
                                               const void* residual, void* y, float dropout, const int64_t* seed,
                                               int64_t rows, int64_t cols, mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Weights offset = weights_of(bias, weight_dtype);
    const auto rows_of = [&](auto drops) {
      return [&, drops](int64_t begin, int64_t end) {
        Noise noise(dropout, seed);
        for (int64_t first = begin * cols; first < end * cols; first += cols)
          forward_row<T, drops.value>(at<T>(x, first), offset, at<T>(residual, first), at<T>(y, first), cols, noise, first);
      };
    };
    if (dropout > 0.f) return parallel(executor, rows, row_grain(cols, kDearGrain), rows_of(std::true_type()));
    parallel(executor, rows, row_grain(cols, kCheapGrain), rows_of(std::false_type()));
  });
}

extern "C" int mx_cpu_bias_dropout_add_backward(int dtype, int weight_dtype, const void* dy, void* dx, void* dbias,
                                                float* workspace, int64_t partitions, float dropout, const int64_t* seed,
                                                int64_t rows, int64_t cols, mx_parallel_for executor) {
  if (!weight_dtype_ok(dtype, weight_dtype) || !shape_ok(rows, cols) || !partitions_ok(partitions)) return MX_BAD_ARGUMENT;
  if (!dropout_ok(dropout, seed) || (dropout > 0.f && rows > 0 && !dx)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const ColumnSums<1> sums{workspace, partitions, rows, cols};
    const auto rows_of = [&](auto drops) {
      return [&, drops](int64_t row, int64_t end, const std::array<float*, 1>& partial) {
        Noise noise(dropout, seed);
        for (int64_t first = row * cols; first < end * cols; first += cols)
          backward_row<T, drops.value>(at<T>(dy, first), at<T>(dx, first), dbias ? partial[0] : nullptr, cols, noise, first);
      };
    };
    if (dropout > 0.f) {
      sums.gather(executor, kDearGrain, rows_of(std::true_type()));
    } else if (dbias) {
      sums.gather(executor, kCheapGrain, rows_of(std::false_type()));
    }
    sums.template finish<T>(executor, 0, dbias, weight_dtype == MX_FLOAT32);
  });
}
