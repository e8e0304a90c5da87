// Softmax of long rows of single elements (N = 1 in softmax.cuh): what a lane would hold of such a row, with the addresses
// and the noise, is more than the registers of 1024 threads. So nothing is kept and the row is read again for every pass:
// forward for its maximum, its sum, and what is written; backward for the sum, and for what is written.
#pragma once
#include "softmax_rows.cuh"

namespace mx {

template <class T>
__global__ void __launch_bounds__(softmax_threads(per_lane(1, false)), 1)
    softmax_forward_loop_kernel(const T* __restrict__ scores, T* __restrict__ probs, T* __restrict__ dropped,
                                float scale, Dropout dropout, const int64_t* seed_from, AttentionRows shape) {
  MX_SHARED(float, scratch, [2 * kMaxWarps]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, start = row * shape.sk;
  const int lanes = static_cast<int>(blockDim.x);
  const int length = visible_columns(shape, row);

  float top[1] = {-INFINITY};
  for (int column = static_cast<int>(threadIdx.x); column < length; column += lanes) {
    float value[1];
    load<T, 1>(scores + start + column, value);
    top[0] = fmaxf(top[0], value[0] * scale);
  }
  reduce_row<Max>(top, scratch);

  float total[1] = {0.f};
  for (int column = static_cast<int>(threadIdx.x); column < length; column += lanes) {
    float value[1];
    load<T, 1>(scores + start + column, value);
    total[0] += __expf(value[0] * scale - top[0]);
  }
  reduce_row<Sum>(total, scratch + kMaxWarps);
  if (row >= shape.rows) return;
  const float inverse = 1.f / total[0];
  const uint64_t seed = read_seed(dropout, seed_from);

  for (int column = static_cast<int>(threadIdx.x); column < shape.sk; column += lanes) {
    float value[1] = {0.f};
    if (column < length) {
      load<T, 1>(scores + start + column, value);
      value[0] = __expf(value[0] * scale - top[0]) * inverse;
    }
    store<T, 1>(probs + start + column, value);
    if (!dropout.threshold) continue;
    if (column < length) apply_dropout<1>(dropout, seed, start + column, value);
    store<T, 1>(dropped + start + column, value);
  }
}

// dy and dscores may be one tensor: a thread writes only what it has read.
template <class T>
__global__ void __launch_bounds__(softmax_threads(per_lane(1, false)), 1)
    softmax_backward_loop_kernel(const T* dy, const T* __restrict__ probs, T* dscores, float scale, Dropout dropout,
                                  const int64_t* seed_from, AttentionRows shape) {
  MX_SHARED(float, scratch, [kMaxWarps]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, start = row * shape.sk;
  const int lanes = static_cast<int>(blockDim.x);
  const int length = visible_columns(shape, row);
  const uint64_t seed = read_seed(dropout, seed_from);

  float product[1] = {0.f};
  for (int column = static_cast<int>(threadIdx.x); column < length; column += lanes) {
    float p[1], g[1];
    load<T, 1>(probs + start + column, p);
    load<T, 1>(dy + start + column, g);
    if (dropout.threshold) apply_dropout<1>(dropout, seed, start + column, g);
    product[0] += p[0] * g[0];
  }
  reduce_row<Sum>(product, scratch);
  if (row >= shape.rows) return;

  for (int column = static_cast<int>(threadIdx.x); column < shape.sk; column += lanes) {
    float g[1] = {0.f};
    if (column < length) {
      float p[1];
      load<T, 1>(probs + start + column, p);
      load<T, 1>(dy + start + column, g);
      if (dropout.threshold) apply_dropout<1>(dropout, seed, start + column, g);
      g[0] = scale * p[0] * (g[0] - product[0]);
    }
    store<T, 1>(dscores + start + column, g);
  }
}

}  // namespace mx
