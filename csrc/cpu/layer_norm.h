// LayerNorm on one row, which stays in the first cache between passes; layer_norm.cpp and add_layer_norm.cpp say the rest.
#pragma once
#include "column_sums.h"

namespace mx::cpu {

struct RowStatistics {
  float mean;
  float rstd;

  // x_hat of a vector of the row.
  template <class T, class Lanes>
  MX_INLINE Floats normalized(const T* x, int64_t c, Lanes lanes) const {
    return (load(x + c, lanes) - mean) * rstd;
  }
};

// With float32 the mean is found twice: the second pass adds the deviations from the first mean, of which the average is what
// rounding took from it, so that neither the variance nor y suffers where the mean is much larger than the spread. With 16
// bits a mean in float32 is exact enough, and the deviations of the few values that occur would all be rounded alike.
template <class T>
MX_INLINE RowStatistics normalize_row(const T* x, const Weights& weight, const Weights& bias, T* y, int64_t cols, float eps) {
  constexpr bool twice = sizeof(T) == sizeof(float);
  const float count = static_cast<float>(cols);
  const float center = sum_row(cols, [&](int64_t c, auto lanes) { return load(x + c, lanes); }) / count;
  Sum first, second;
  for_vectors(cols, [&](int64_t c, auto lanes, int chain) {
    const Floats d = keep(load(x + c, lanes) - center, Floats{}, lanes);
    if (twice) first.chain[chain] += d;
    second.chain[chain] += d * d;
  });
  const float shift = twice ? first.total() / count : 0.f;
  const float variance = second.total() / count - shift * shift;
  const float rstd = 1.f / __builtin_sqrtf((variance < 0.f ? 0.f : variance) + eps);
  for_vectors(cols, [&](int64_t c, auto lanes, int) {
    prefetch(x + cols + c);
    Floats d = load(x + c, lanes) - center;
    if (twice) d -= shift;
    store(y + c, d * rstd * load_weights<T>(weight, c, lanes) + load_weights<T>(bias, c, lanes), lanes);
  });
  return {center + shift, rstd};
}

// d = rstd * (g - avg(g) - x_hat * avg(g * x_hat)), g = dy * weight, of R rows that begin at dy and at x, to
// output(number of the row, column, lanes, d); sums[0] += dy * x_hat and sums[1] += dy. Two rows at a time read and write
// the sums once for both.
template <int R, class T, class Output>
MX_INLINE void backward_rows(const T* dy, const T* x, const RowStatistics (&from)[R], const Weights& weight, int64_t cols,
                             float* dweight, float* dbias, Output output) {
  Floats mean_g[R] = {}, mean_gx[R] = {};
  for_vectors(cols, [&](int64_t c, auto lanes, int) {
    const Floats w = load_weights<T>(weight, c, lanes);
    Floats to_weight = load(dweight + c, lanes), to_bias = load(dbias + c, lanes);
    for (int r = 0; r < R; ++r) {
      const Floats d = load(dy + r * cols + c, lanes), x_hat = from[r].normalized(x + r * cols, c, lanes);
      const Floats g = apart(d * w);
      mean_g[r] += g;
      mean_gx[r] += g * x_hat;
      to_weight += d * x_hat;
      to_bias += d;
    }
    store(dweight + c, to_weight, lanes);
    store(dbias + c, to_bias, lanes);
  });
  float average_g[R], average_gx[R];
  for (int r = 0; r < R; ++r) {
    average_g[r] = sum_lanes(mean_g[r]) / static_cast<float>(cols);
    average_gx[r] = sum_lanes(mean_gx[r]) / static_cast<float>(cols);
  }
  for_vectors(cols, [&](int64_t c, auto lanes, int) {
    const Floats w = load_weights<T>(weight, c, lanes);
    for (int r = 0; r < R; ++r) {
      prefetch(dy + (R + r) * cols + c);
      prefetch(x + (R + r) * cols + c);
      const Floats g = apart(load(dy + r * cols + c, lanes) * w), x_hat = from[r].normalized(x + r * cols, c, lanes);
      output(r, c, lanes, from[r].rstd * ((g - average_g[r]) - x_hat * average_gx[r]));
    }
  });
}

}  // namespace mx::cpu
