// Bias, dropout and the residual add, forward and backward:
//
//   y = residual + (x + bias) * factor,    factor: 0, or 1 / (1 - dropout), from Philox (philox.h) and the element's index
//   dx = dy * factor,   dbias = column sums of dx,   and the gradient of residual is dy
//
// Layout: x, residual, y [rows, cols], bias [cols]; threads to data as bias_tile.cuh says. Saved: nothing but the seed.
// Without dropout dx is dy, so the backward pass only adds columns and writes no dx.
#pragma once
#include "bias_tile.cuh"

namespace mx {

template <class T, int N>
__global__ void __launch_bounds__(kTileLanes* kTileRows, 1)
    bias_dropout_add_forward_kernel(const T* __restrict__ x, Weights bias, const T* __restrict__ residual,
                                    T* __restrict__ y, Dropout dropout, const int64_t* seed_from, int64_t rows,
                                    int64_t cols) {
  const TileRows at = tile_rows<N>();
  if (at.column >= cols) return;
  const uint64_t seed = read_seed(dropout, seed_from);
  float offset[N];
  load_bias<T, N>(bias, at.column, cols, offset);
  for (int64_t row = at.first; row < rows; row += kRowsAhead * at.step) {
    Pack<T, N> in[kRowsAhead], other[kRowsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      const int64_t from = (row + ahead * at.step) * cols + at.column;
      in[ahead] = read<T, N>(x + from);
      other[ahead] = read<T, N>(residual + from);
    }
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      const int64_t to = (row + ahead * at.step) * cols + at.column;
      float value[N];
      unpack(in[ahead], value);
#pragma unroll
      for (int k = 0; k < N; ++k) value[k] += offset[k];
      if (dropout.threshold) apply_dropout<N>(dropout, seed, to, value);
#pragma unroll
      for (int k = 0; k < N; ++k) value[k] += other[ahead].get(k);
      store<T, N>(y + to, value);
    }
  }
}

// dx is null without dropout, workspace where no column sums are asked for.
template <class T, int N>
__global__ void __launch_bounds__(kTileLanes* kTileRows, 1)
    bias_dropout_add_backward_kernel(const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ workspace,
                                     Dropout dropout, const int64_t* seed_from, int64_t rows, int64_t cols) {
  const TileRows at = tile_rows<N>();
  const uint64_t seed = read_seed(dropout, seed_from);
  float sum[N];
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] = 0.f;
  for (int64_t row = at.column < cols ? at.first : rows; row < rows; row += kRowsAhead * at.step) {
    Pack<T, N> in[kRowsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      in[ahead] = read<T, N>(dy + (row + ahead * at.step) * cols + at.column);
    }
#pragma unroll
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (row + ahead * at.step >= rows) break;
      const int64_t to = (row + ahead * at.step) * cols + at.column;
      float value[N];
      unpack(in[ahead], value);
      if (dropout.threshold) {
        apply_dropout<N>(dropout, seed, to, value);
        store<T, N>(dx + to, value);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += value[k];
    }
  }
  if (workspace) write_column_sums<N>(sum, workspace, at.column, cols);
}

template <class T, int N>
int launch_bias_dropout_add_forward(const void* x, Weights bias, const void* residual, void* y, Dropout dropout,
                                    const int64_t* seed, int64_t rows, int64_t cols, cudaStream_t stream) {
  const TileGrid tiles = tile_grid<N>(rows, cols, kAnyPartitions);
  const dim3 grid(static_cast<unsigned>(tiles.across), static_cast<unsigned>(tiles.down));
  MX_LAUNCH((bias_dropout_add_forward_kernel<T, N>), grid, dim3(kTileLanes, kTileRows), 0, stream,
            static_cast<const T*>(x), bias, static_cast<const T*>(residual), static_cast<T*>(y), dropout, seed, rows,
            cols);
  return MX_LAST_ERROR();
}

template <class T, int N>
int launch_bias_dropout_add_backward(const void* dy, void* dx, void* dbias, int weight_dtype, float* workspace,
                                     int64_t partitions, Dropout dropout, const int64_t* seed, int64_t rows,
                                     int64_t cols, cudaStream_t stream) {
  const TileGrid tiles = tile_grid<N>(rows, cols, dbias ? partitions : kAnyPartitions);
  const dim3 grid(static_cast<unsigned>(tiles.across), static_cast<unsigned>(tiles.down));
  MX_LAUNCH((bias_dropout_add_backward_kernel<T, N>), grid, dim3(kTileLanes, kTileRows), 0, stream,
            static_cast<const T*>(dy), static_cast<T*>(dx), dbias ? workspace : nullptr, dropout, seed, rows, cols);
  const int status = MX_LAST_ERROR();
  if (status != 0 || !dbias) return status;
  return sum_columns(workspace, {dbias, nullptr, nullptr}, 1, weight_dtype, tiles.down, cols, stream);
}

}  // namespace mx
