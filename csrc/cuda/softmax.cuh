// Softmax of attention scores, causal or masked, with dropout, forward and backward:
//
//   p = exp(scale * s - m) / sum exp(scale * s - m),   m = max(scale * s),   over the columns a row may see
//   dropped = p * factor                               factor: 0, or 1 / (1 - dropout), from Philox (philox.h)
//   ds = scale * p * (g - sum(p * g)),                 g = dy * factor
//
// Layout: scores [rows, sk], row = (batch * heads + head) * sq + i. Causal: row i sees columns 0 .. i + sk - sq; what is
// beyond is neither read nor computed, and written as 0. Masked: it sees those whose mask byte is 0; a row that sees
// none is 0. Saved for the backward pass: p, and the seed of the dropout.
//
// Threads to data: a row belongs to threadIdx.x of its block, blockDim.y rows to a block: rows of up to a warp have a
// power of two of lanes, so that a warp has 32 rows of 8 columns or one of 256; longer rows have whole warps. Lane l
// holds vectors l, l + lanes, ... of 16 bytes, or, where rows do not begin at a multiple of 16 bytes, single elements
// in the same way (N = 1). The row is in registers from its one read to its one write, but for the backward pass over
// long rows of single elements.
#pragma once
#include "dispatch.h"

namespace mx {

// Elements to a lane: few for short rows, whose lanes then read next to each other; beyond, as many as leave registers
// for their addresses, of which single elements need one each.
constexpr int64_t kShortRow = 256;
constexpr int per_lane(int vector, bool is_short) { return is_short ? 8 : vector == 1 ? 16 : 32; }

// The most threads of a block: those of rows of kMaxRegisterColumns.
constexpr int softmax_threads(int per_lane) { return per_lane == 8 ? kRowBlock : 16384 / per_lane; }

// Rows of a tensor [batch, heads, sq, sk]; `visible` is 0 in a masked softmax, else the columns that row 0 sees.
struct AttentionRows {
  int64_t rows;
  int sq;
  int sk;
  int visible;
};

// row % count, with 32 bits where they do: a 64-bit division costs more than a short row.
MX_DEVICE int64_t divide(int64_t row, int64_t count, int64_t& remainder) {
  if (static_cast<uint64_t>(row | count) >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(row) / static_cast<uint32_t>(count);
    remainder = static_cast<uint32_t>(row) - quotient * static_cast<uint32_t>(count);
    return quotient;
  }
  const int64_t quotient = row / count;
  remainder = row - quotient * count;
  return quotient;
}

MX_DEVICE int visible_columns(const AttentionRows& shape, int64_t row) {
  if (row >= shape.rows) return 0;
  if (shape.visible == 0) return shape.sk;
  int64_t i;
  divide(row, shape.sq, i);
  return static_cast<int>(i) + shape.visible;
}

// The mask: [shape of one batch] where shared, else one for every `rows_per_mask` rows.
struct MaskRows {
  const uint8_t* mask;
  int64_t rows_per_mask;
  int shared;
};

template <int N>
struct alignas(N) MaskBytes {
  uint8_t hidden[N];
};

template <int N>
MX_DEVICE void hide(const MaskRows& mask, const AttentionRows& shape, int64_t row, int column, float (&value)[N],
                    float& seen) {
  int64_t i, batch_row;
  divide(row, shape.sq, i);
  const int64_t batch = mask.shared ? 0 : divide(row, mask.rows_per_mask, batch_row);
  const MaskBytes<N> bytes =
      *reinterpret_cast<const MaskBytes<N>*>(mask.mask + (batch * shape.sq + i) * shape.sk + column);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (bytes.hidden[k]) {
      value[k] = -INFINITY;
    } else {
      seen = 1.f;
    }
  }
}

template <class T, int N, int PER_LANE, bool MASKED>
__global__ void __launch_bounds__(softmax_threads(PER_LANE), 1)
    softmax_forward_kernel(const T* __restrict__ scores, MaskRows mask, T* __restrict__ probs, T* __restrict__ dropped,
                           float scale, Dropout dropout, const int64_t* seed_from, AttentionRows shape) {
  constexpr int VECTORS = PER_LANE / N;
  MX_SHARED(float, scratch, [3 * kMaxWarps]);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, start = row * shape.sk;
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int length = visible_columns(shape, row);

  float value[VECTORS][N];
  float top[MASKED ? 2 : 1];  // the maximum and, masked, 1 where any column is seen
  top[0] = -INFINITY;
  if constexpr (MASKED) top[1] = 0.f;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= length) continue;
    load<T, N>(scores + start + column, value[v]);
#pragma unroll
    for (int k = 0; k < N; ++k) value[v][k] = column + k < length ? value[v][k] * scale : -INFINITY;
    if constexpr (MASKED) hide<N>(mask, shape, row, column, value[v], top[1]);
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
  reduce_row<Sum>(total, scratch + 2 * kMaxWarps);
  if (row >= shape.rows) return;
  bool empty = false;
  if constexpr (MASKED) empty = top[1] == 0.f;
  const float inverse = 1.f / total[0];
  const uint64_t seed = read_seed(dropout, seed_from);

#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (column >= shape.sk) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) value[v][k] = column + k < length && !empty ? value[v][k] * inverse : 0.f;
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

// Long rows of single elements: what a lane holds of them, with its addresses and the noise, is more than the registers
// of 1024 threads, so the row is read, and its noise drawn, a second time. dy and dscores may be one tensor here too.
template <class T>
__global__ void __launch_bounds__(softmax_threads(per_lane(1, false)), 1)
    softmax_backward_twice_kernel(const T* dy, const T* __restrict__ probs, T* dscores, float scale, Dropout dropout,
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

template <class T, int N, bool MASKED>
int launch_softmax_forward(const void* scores, const MaskRows& mask, void* probs, void* dropped, float scale,
                           Dropout dropout, const int64_t* seed, const AttentionRows& shape, cudaStream_t stream) {
  const SoftmaxGrid g = softmax_grid<N>(shape);
  if (g.blocks > kMaxGrid) return MX_UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>(g.blocks)), block(g.block.lanes, g.block.rows);
  const T* from = static_cast<const T*>(scores);
  T* p_out = static_cast<T*>(probs);
  T* dropped_out = static_cast<T*>(dropped);
  if (shape.sk <= kShortRow) {
    MX_LAUNCH((softmax_forward_kernel<T, N, per_lane(N, true), MASKED>), grid, block, 0, stream, from, mask, p_out,
              dropped_out, scale, dropout, seed, shape);
  } else {
    MX_LAUNCH((softmax_forward_kernel<T, N, per_lane(N, false), MASKED>), grid, block, 0, stream, from, mask, p_out,
              dropped_out, scale, dropout, seed, shape);
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
    MX_LAUNCH((softmax_backward_twice_kernel<T>), grid, block, 0, stream, dy_in, p_in, out, scale, dropout, seed,
              shape);
  } else {
    MX_LAUNCH((softmax_backward_kernel<T, N, per_lane(N, false)>), grid, block, 0, stream, dy_in, p_in, out, scale,
              dropout, seed, shape);
  }
  return MX_LAST_ERROR();
}

}  // namespace mx
