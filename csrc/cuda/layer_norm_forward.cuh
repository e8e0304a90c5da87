// LayerNorm forward, alone or after the residual add:
//
//   sum = residual + dropout(x + x_bias)                        (ADD; else sum is x)
//   y   = (sum - mean) * rstd * weight + bias,   mean = avg(sum),   rstd = 1 / sqrt(avg((sum - mean)^2) + eps)
//
// Layout: rows of `cols` elements, one after the other. Saved for the backward pass: mean and rstd, float32, and with
// ADD the sum in the dtype of the activations, which is also what the statistics are those of.
//
// Threads to data: a row belongs to threadIdx.x of its block, blockDim.y rows to a block; lane l holds vectors
// l, l + lanes, ... of 16 bytes in registers, so memory is read once. The mean is taken twice: from the values, then from
// what remains of them after the first mean is taken off, which leaves nothing of a large mean's rounding in the variance.
//
// Rows that 16-byte vectors do not fit, or that are longer than registers hold, are read three times by a block each.
#pragma once
#include "dispatch.h"

namespace mx {

constexpr int kLoopBlock = 256;

// avg(d) and avg(d^2) of what is left after the first mean: the correction of the mean, and rstd.
struct Moments {
  float shift;
  float rstd;
};

MX_DEVICE Moments moments_of(const float (&sums)[2], int cols, float eps) {
  const float shift = sums[0] / static_cast<float>(cols);
  const float variance = sums[1] / static_cast<float>(cols) - shift * shift;
  return {shift, rsqrtf(fmaxf(variance, 0.f) + eps)};
}

template <class T, int PER_LANE, bool ADD>
__global__ void __launch_bounds__(PER_LANE == 8 ? kRowBlock : 512, 1)
    layer_norm_forward_kernel(const T* __restrict__ x, Weights x_bias, const T* __restrict__ residual, Weights weight,
                              Weights bias, T* __restrict__ sum, T* __restrict__ y, float* __restrict__ mean,
                              float* __restrict__ rstd, Dropout dropout, const int64_t* seed_from, int64_t rows,
                              int cols, float eps) {
  constexpr int N = kVector<T>, VECTORS = PER_LANE / N;
  MX_SHARED(float, scratch, [3 * kMaxWarps]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < rows;
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const uint64_t seed = ADD ? read_seed(dropout, seed_from) : 0;

  float value[VECTORS][N];
  float total[1] = {0.f};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
#pragma unroll
    for (int k = 0; k < N; ++k) value[v][k] = 0.f;
    if (!live || column >= cols) continue;
    const int64_t at = row * cols + column;
    load<T, N>(x + at, value[v]);
    if constexpr (ADD) {
      float other[N];
      if (x_bias.data) {
        load_weights<T, N>(x_bias, column, other);
#pragma unroll
        for (int k = 0; k < N; ++k) value[v][k] += other[k];
      }
      if (dropout.threshold) apply_dropout<N>(dropout, seed, at, value[v]);
      load<T, N>(residual + at, other);
#pragma unroll
      for (int k = 0; k < N; ++k) value[v][k] = to_float(from_float<T>(value[v][k] + other[k]));
      store<T, N>(sum + at, value[v]);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) total[0] += value[v][k];
  }
  reduce_row<Sum>(total, scratch);
  const float first_mean = total[0] / static_cast<float>(cols);

  float sums[2] = {0.f, 0.f};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if ((v * lanes + lane) * N >= cols) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      value[v][k] -= first_mean;
      sums[0] += value[v][k];
      sums[1] += value[v][k] * value[v][k];
    }
  }
  reduce_row<Sum>(sums, scratch + kMaxWarps);
  const Moments moments = moments_of(sums, cols, eps);
  if (!live) return;

#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= cols) continue;
    float scale[N], offset[N];
    load_weights<T, N>(weight, column, scale);
    load_weights<T, N>(bias, column, offset);
#pragma unroll
    for (int k = 0; k < N; ++k) value[v][k] = (value[v][k] - moments.shift) * moments.rstd * scale[k] + offset[k];
    store<T, N>(y + row * cols + column, value[v]);
  }
  if (lane == 0) {
    mean[row] = first_mean + moments.shift;
    rstd[row] = moments.rstd;
  }
}

template <class T, bool ADD>
__global__ void __launch_bounds__(kLoopBlock)
    layer_norm_forward_loop_kernel(const T* __restrict__ x, Weights x_bias, const T* __restrict__ residual,
                                   Weights weight, Weights bias, T* sum, T* __restrict__ y, float* __restrict__ mean,
                                   float* __restrict__ rstd, Dropout dropout, const int64_t* seed_from, int cols,
                                   float eps) {
  MX_SHARED(float, scratch, [3 * kMaxWarps]);
  const int64_t row = blockIdx.x, start = row * cols;
  const int thread = static_cast<int>(threadIdx.x);
  const uint64_t seed = ADD ? read_seed(dropout, seed_from) : 0;

  float total[1] = {0.f};
  for (int column = thread; column < cols; column += kLoopBlock) {
    float value[1];
    load<T, 1>(x + start + column, value);
    if constexpr (ADD) {
      float other[1];
      if (x_bias.data) {
        load_weights<T, 1>(x_bias, column, other);
        value[0] += other[0];
      }
      if (dropout.threshold) apply_dropout<1>(dropout, seed, start + column, value);
      load<T, 1>(residual + start + column, other);
      value[0] = to_float(from_float<T>(value[0] + other[0]));
      store<T, 1>(sum + start + column, value);
    }
    total[0] += value[0];
  }
  reduce_row<Sum>(total, scratch);
  const float first_mean = total[0] / static_cast<float>(cols);

  // A thread reads again only what it wrote itself.
  const T* values = ADD ? sum : x;
  float sums[2] = {0.f, 0.f};
  for (int column = thread; column < cols; column += kLoopBlock) {
    const float value = to_float(values[start + column]) - first_mean;
    sums[0] += value;
    sums[1] += value * value;
  }
  reduce_row<Sum>(sums, scratch + kMaxWarps);
  const Moments moments = moments_of(sums, cols, eps);

  for (int column = thread; column < cols; column += kLoopBlock) {
    float scale[1], offset[1], out[1];
    load_weights<T, 1>(weight, column, scale);
    load_weights<T, 1>(bias, column, offset);
    const float value = to_float(values[start + column]) - first_mean;
    out[0] = (value - moments.shift) * moments.rstd * scale[0] + offset[0];
    store<T, 1>(y + start + column, out);
  }
  if (thread == 0) {
    mean[row] = first_mean + moments.shift;
    rstd[row] = moments.rstd;
  }
}

// Launches one of the kernels above; arguments have been checked.
template <class T, bool ADD>
int launch_layer_norm_forward(const void* x, Weights x_bias, const void* residual, Weights weight, Weights bias,
                              void* sum, void* y, float* mean, float* rstd, Dropout dropout, const int64_t* seed,
                              int64_t rows, int64_t cols, float eps, cudaStream_t stream) {
  const T* x_in = static_cast<const T*>(x);
  const T* residual_in = static_cast<const T*>(residual);
  T* sum_out = static_cast<T*>(sum);
  T* y_out = static_cast<T*>(y);
  const int columns = static_cast<int>(cols);
  if (cols > kMaxRegisterColumns || cols % kVector<T> != 0 ||
      !aligned(x, x_bias.data, residual, weight.data, bias.data, sum, y)) {
    if (rows > kMaxGrid) return MX_UNSUPPORTED;
    MX_LAUNCH((layer_norm_forward_loop_kernel<T, ADD>), dim3(static_cast<unsigned>(rows)), dim3(kLoopBlock), 0, stream,
              x_in, x_bias, residual_in, weight, bias, sum_out, y_out, mean, rstd, dropout, seed, columns, eps);
    return MX_LAST_ERROR();
  }
  const bool small = cols <= 256;
  const RowShape shape = row_shape(cols, small ? 8 : 32, cols <= 1024 ? kRowBlock : 1);
  const int64_t blocks = ceil_div(rows, shape.rows);
  if (blocks > kMaxGrid) return MX_UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>(blocks)), block(shape.lanes, shape.rows);
  if (small) {
    MX_LAUNCH((layer_norm_forward_kernel<T, 8, ADD>), grid, block, 0, stream, x_in, x_bias, residual_in, weight, bias,
              sum_out, y_out, mean, rstd, dropout, seed, rows, columns, eps);
  } else {
    MX_LAUNCH((layer_norm_forward_kernel<T, 32, ADD>), grid, block, 0, stream, x_in, x_bias, residual_in, weight, bias,
              sum_out, y_out, mean, rstd, dropout, seed, rows, columns, eps);
  }
  return MX_LAST_ERROR();
}

}  // namespace mx
