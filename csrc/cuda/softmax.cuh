// Causal softmax of attention scores, with dropout, forward and backward:
//
//   p = exp(scale * s - m) / sum exp(scale * s - m),   m = max(scale * s),   over the columns a row may see
//   dropped = p * factor                               factor: 0, or 1 / (1 - dropout), from Philox (philox.h)
//   ds = scale * p * (g - sum(p * g)),                 g = dy * factor
//
// Layout: scores [rows, sk], row = (batch * heads + head) * sq + i. Row i sees columns 0 .. i + sk - sq; what is beyond
// is neither read nor computed, and written as 0. Saved for the backward pass: p, and the seed of the dropout.
//
// Threads to data: a row belongs to threadIdx.x of its block, blockDim.y rows to a block: rows of up to a warp have a
// power of two of lanes, so that a warp has 32 rows of 8 columns or one of 256; longer rows have whole warps. Lane l
// holds vectors l, l + lanes, ... of 16 bytes, or, where rows do not begin at a multiple of 16 bytes, single elements
// in the same way (N = 1). The row is in registers from its one read to its one write, but for long rows of single
// elements, which are read again for every pass over them.
#pragma once
#include "softmax_loop.cuh"
#include "softmax_rows.cuh"

namespace mx {

template <class T, int N, int PER_LANE>
__global__ void __launch_bounds__(softmax_threads(PER_LANE), 1)
    softmax_forward_kernel(const T* __restrict__ scores, T* __restrict__ probs, T* __restrict__ dropped, float scale,
                           Dropout dropout, const int64_t* seed_from, AttentionRows shape) {
  constexpr int VECTORS = PER_LANE / N;
  MX_SHARED(float, scratch, [2 * kMaxWarps]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, start = row * shape.sk;
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int length = visible_columns(shape, row);

  float value[VECTORS][N];
  float top[1] = {-INFINITY};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= length) continue;
    load<T, N>(scores + start + column, value[v]);
#pragma unroll
    for (int k = 0; k < N; ++k) value[v][k] = column + k < length ? value[v][k] * scale : -INFINITY;
#pragma unroll
    for (int k = 0; k < N; ++k) top[0] = fmaxf(top[0], value[v][k]);
  }
  reduce_row<Max>(top, scratch);

  float total[1] = {0.f};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= length) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      // A row that is -inf everywhere is NaN, as it is in torch, but not what lies beyond the diagonal.
      value[v][k] = column + k < length ? __expf(value[v][k] - top[0]) : 0.f;
      total[0] += value[v][k];
    }
  }
  reduce_row<Sum>(total, scratch + kMaxWarps);
  if (row >= shape.rows) return;
  const float inverse = 1.f / total[0];
  const uint64_t seed = read_seed(dropout, seed_from);

#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= shape.sk) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) value[v][k] = column + k < length ? value[v][k] * inverse : 0.f;
    store<T, N>(probs + start + column, value[v]);
    if (!dropout.threshold) continue;
    if (column < length) apply_dropout<N>(dropout, seed, start + column, value[v]);
    store<T, N>(dropped + start + column, value[v]);
  }
}

// dy and dscores may be one tensor: a thread writes only what it has read.
template <class T, int N, int PER_LANE>
__global__ void __launch_bounds__(softmax_threads(PER_LANE), 1)
    softmax_backward_kernel(const T* dy, const T* __restrict__ probs, T* dscores, float scale, Dropout dropout,
                            const int64_t* seed_from, AttentionRows shape) {
  constexpr int VECTORS = PER_LANE / N;
  MX_SHARED(float, scratch, [kMaxWarps]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, start = row * shape.sk;
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int length = visible_columns(shape, row);
  const uint64_t seed = read_seed(dropout, seed_from);

  Pack<T, N> p[VECTORS];
  float g[VECTORS][N];
  float product[1] = {0.f};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= length) continue;
    p[v] = read<T, N>(probs + start + column);
    load<T, N>(dy + start + column, g[v]);
    if (dropout.threshold) apply_dropout<N>(dropout, seed, start + column, g[v]);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (column + k < length) product[0] += p[v].get(k) * g[v][k];
    }
  }
  reduce_row<Sum>(product, scratch);
  if (row >= shape.rows) return;

#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= shape.sk) continue;
#pragma unroll
    for (int k = 0; k < N; ++k)
      g[v][k] = column + k < length ? scale * p[v].get(k) * (g[v][k] - product[0]) : 0.f;
    store<T, N>(dscores + start + column, g[v]);
  }
}

struct SoftmaxGrid {
  RowShape block;
  int64_t blocks;
};

template <int N>
SoftmaxGrid softmax_grid(const AttentionRows& shape) {
  RowShape block = row_shape(shape.sk, per_lane(N, shape.sk <= kShortRow), kRowBlock);
  if (block.lanes > 32) block.rows = 1;
  return {block, ceil_div(shape.rows, block.rows)};
}

template <class T, int N>
int launch_softmax_forward(const void* scores, void* probs, void* dropped, float scale, Dropout dropout,
                           const int64_t* seed, const AttentionRows& shape, cudaStream_t stream) {
  const SoftmaxGrid g = softmax_grid<N>(shape);
  if (g.blocks > kMaxGrid) return MX_UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>(g.blocks)), block(g.block.lanes, g.block.rows);
  const T* from = static_cast<const T*>(scores);
  T* p_out = static_cast<T*>(probs);
  T* dropped_out = static_cast<T*>(dropped);
  if (shape.sk <= kShortRow) {
    MX_LAUNCH((softmax_forward_kernel<T, N, per_lane(N, true)>), grid, block, 0, stream, from, p_out, dropped_out, scale,
              dropout, seed, shape);
  } else if constexpr (N == 1) {
    MX_LAUNCH((softmax_forward_loop_kernel<T>), grid, block, 0, stream, from, p_out, dropped_out, scale, dropout, seed,
              shape);
  } else {
    MX_LAUNCH((softmax_forward_kernel<T, N, per_lane(N, false)>), grid, block, 0, stream, from, p_out, dropped_out, scale,
              dropout, seed, shape);
  }
  return MX_LAST_ERROR();
}

template <class T, int N>
int launch_softmax_backward(const void* dy, const void* probs, void* dscores, float scale, Dropout dropout,
                            const int64_t* seed, const AttentionRows& shape, cudaStream_t stream) {
  const SoftmaxGrid g = softmax_grid<N>(shape);
  if (g.blocks > kMaxGrid) return MX_UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>(g.blocks)), block(g.block.lanes, g.block.rows);
  const T* dy_in = static_cast<const T*>(dy);
  const T* p_in = static_cast<const T*>(probs);
  T* out = static_cast<T*>(dscores);
  if (shape.sk <= kShortRow) {
    MX_LAUNCH((softmax_backward_kernel<T, N, per_lane(N, true)>), grid, block, 0, stream, dy_in, p_in, out, scale,
              dropout, seed, shape);
  } else if constexpr (N == 1) {
    MX_LAUNCH((softmax_backward_loop_kernel<T>), grid, block, 0, stream, dy_in, p_in, out, scale, dropout, seed,
              shape);
  } else {
    MX_LAUNCH((softmax_backward_kernel<T, N, per_lane(N, false)>), grid, block, 0, stream, dy_in, p_in, out, scale,
              dropout, seed, shape);
  }
  return MX_LAST_ERROR();
}

}  // namespace mx
