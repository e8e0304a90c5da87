// Bias and GELU, forward and backward:
//
//   z = x + bias,   y = z * s
//   tanh form:  s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)),  u = sqrt(2 / pi) * (z + 0.044715 z^3)
//   exact form: s = (1 + erf(z / sqrt(2))) / 2
//   dx = dy * (s + z * ds/dz),   dbias = column sums of dx
//
// Layout: x [rows, cols], bias [cols]; threads to data as bias_tile.cuh says. Saved: x. Column sums go to workspace
// [blockIdx.y][cols] and are added by sum_columns.
#pragma once
#include "bias_tile.cuh"

namespace mx {

constexpr float kSqrtTwoOverPi = 0.7978845608028654f, kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.7071067811865476f, kInverseSqrtTwoPi = 0.3989422804014327f;

// The tanh form's s, and s * (1 - s): from an exponential that is at most 1, so that neither overflows and both keep their
// relative precision where 1 + tanh or 1 - s would cancel.
struct Sigmoid {
  float value;
  float product;
};

MX_DEVICE Sigmoid sigmoid_of_tanh(float z) {
  const float u = kSqrtTwoOverPi * (z + kCubic * z * z * z);
  const float e = __expf(-2.f * fabsf(u));
  const float inverse = __fdividef(1.f, 1.f + e);
  return {u < 0.f ? e * inverse : inverse, e * inverse * inverse};
}

template <bool EXACT>
MX_DEVICE float gelu(float z) {
  if constexpr (EXACT) return 0.5f * z * (1.f + erff(z * kSqrtHalf));
  return z * sigmoid_of_tanh(z).value;
}

template <bool EXACT>
MX_DEVICE float gelu_slope(float z) {
  if constexpr (EXACT) return 0.5f * (1.f + erff(z * kSqrtHalf)) + z * kInverseSqrtTwoPi * __expf(-0.5f * z * z);
  const Sigmoid s = sigmoid_of_tanh(z);
  // Far out s is 0 or 1 and its slope 0, but the square of z may be infinite. NaN goes the other way, and stays NaN.
  if (fabsf(z) > 64.f) return s.value;
  return s.value + z * s.product * 2.f * kSqrtTwoOverPi * (1.f + 3.f * kCubic * z * z);
}

template <class T, int N, bool EXACT>
__global__ void __launch_bounds__(kTileLanes* kTileRows)
    bias_gelu_forward_kernel(const T* __restrict__ x, Weights bias, T* __restrict__ y, int64_t rows, int64_t cols) {
  const TileRows at = tile_rows<N>();
  if (at.column >= cols) return;
  float offset[N];
  load_bias<T, N>(bias, at.column, cols, offset);
  for (int64_t row = at.first; row < rows; row += kRowsAhead * at.step) {
    Pack<T, N> in[kRowsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead)
      if (row + ahead * at.step < rows) in[ahead] = read<T, N>(x + (row + ahead * at.step) * cols + at.column);
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      float z[N];
      unpack(in[ahead], z);
#pragma unroll
      for (int k = 0; k < N; ++k) z[k] = gelu<EXACT>(z[k] + offset[k]);
      store<T, N>(y + (row + ahead * at.step) * cols + at.column, z);
    }
  }
}

// dy and dx may be one tensor. workspace is null where no column sums are asked for.
template <class T, int N, bool EXACT>
__global__ void __launch_bounds__(kTileLanes* kTileRows)
    bias_gelu_backward_kernel(const T* dy, const T* __restrict__ x, Weights bias, T* dx, float* __restrict__ workspace,
                              int64_t rows, int64_t cols) {
  const TileRows at = tile_rows<N>();
  float offset[N], sum[N];
  load_bias<T, N>(bias, at.column, cols, offset);
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] = 0.f;
  for (int64_t row = at.column < cols ? at.first : rows; row < rows; row += kRowsAhead * at.step) {
    Pack<T, N> in[kRowsAhead], gradient[kRowsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      const int64_t from = (row + ahead * at.step) * cols + at.column;
      in[ahead] = read<T, N>(x + from);
      gradient[ahead] = read<T, N>(dy + from);
    }
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      float z[N], out[N];
      unpack(in[ahead], z);
      unpack(gradient[ahead], out);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        out[k] *= gelu_slope<EXACT>(z[k] + offset[k]);
        sum[k] += out[k];
      }
      store<T, N>(dx + (row + ahead * at.step) * cols + at.column, out);
    }
  }
  if (workspace) write_column_sums<N>(sum, workspace, at.column, cols);
}

template <class T, int N, bool EXACT>
int launch_bias_gelu_forward(const void* x, Weights bias, void* y, int64_t rows, int64_t cols, cudaStream_t stream) {
  const TileGrid tiles = tile_grid<N>(rows, cols, kAnyPartitions);
  const dim3 grid(static_cast<unsigned>(tiles.across), static_cast<unsigned>(tiles.down));
  MX_LAUNCH((bias_gelu_forward_kernel<T, N, EXACT>), grid, dim3(kTileLanes, kTileRows), 0, stream,
            static_cast<const T*>(x), bias, static_cast<T*>(y), rows, cols);
  return MX_LAST_ERROR();
}

template <class T, int N, bool EXACT>
int launch_bias_gelu_backward(const void* dy, const void* x, Weights bias, void* dx, void* dbias, int weight_dtype,
                              float* workspace, int64_t partitions, int64_t rows, int64_t cols, cudaStream_t stream) {
  const TileGrid tiles = tile_grid<N>(rows, cols, partitions);
  const dim3 grid(static_cast<unsigned>(tiles.across), static_cast<unsigned>(tiles.down));
  MX_LAUNCH((bias_gelu_backward_kernel<T, N, EXACT>), grid, dim3(kTileLanes, kTileRows), 0, stream,
            static_cast<const T*>(dy), static_cast<const T*>(x), bias, static_cast<T*>(dx), workspace, rows, cols);
  const int status = MX_LAST_ERROR();
  if (status != 0 || !dbias) return status;
  return sum_columns(workspace, {dbias, nullptr, nullptr}, 1, weight_dtype, tiles.down, cols, stream);
}

}  // namespace mx
