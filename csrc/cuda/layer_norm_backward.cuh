// LayerNorm backward, alone or before the residual add:
//
//   x_hat = (x - mean) * rstd
//   g     = dy * weight
//   d     = rstd * (g - avg(g) - x_hat * avg(g * x_hat))   [+ dsum (ADD)]
//   dx    = d, and with ADD dropped = dropout'(d), the gradient of what was dropped before the sum
//   dweight = column sums of dy * x_hat,  dbias = of dy,  with ADD dx_bias = of dropout'(d)
//
// Threads to data: a block is `partition` p of the rows and walks over them, blockDim.y rows at a time; a row belongs to
// threadIdx.x, lane l has vectors l, l + lanes, ... of 16 bytes. Both averages need one barrier a row (rows of a warp or
// less: none). With 16 bits the next row is requested before the present one is finished with, so memory never waits for
// a barrier. Column sums stay with the thread that has the column, in registers up to 8192 columns and beyond in shared
// memory; at the end they go to workspace [sums][partitions][cols], from where sum_columns adds them in one order.
//
// Rows that 16-byte vectors do not fit, or that are longer than registers hold, are read twice by a block each, which
// keeps its column sums in the workspace from the start.
#pragma once
#include "column_sums.h"
#include "dispatch.h"

namespace mx {

constexpr int kBackwardBlock = 256;
constexpr int kWideBlock = 512;

// Threads of a row; a constant for wide rows, where registers for column numbers would be too many.
template <bool WIDE>
MX_DEVICE int lanes_of_row() {
  return WIDE ? kWideBlock : static_cast<int>(blockDim.x);
}

// What a backward kernel reads and writes; unused pointers are null.
template <class T>
struct LayerNormBackward {
  const T* dy;
  const T* dsum;
  const T* x;
  Weights weight;
  const float* mean;
  const float* rstd;
  T* dx;
  T* dropped;
  float* workspace;
  int sums;
  Dropout dropout;
  const int64_t* seed;
  int64_t rows;
  int cols;
};

// Vectors of one row, as they lie in memory.
template <class T, int N, int VECTORS>
struct RowPair {
  Pack<T, N> dy[VECTORS];
  Pack<T, N> x[VECTORS];
};

template <bool WIDE, class T, int N, int VECTORS>
MX_DEVICE void read_pair(const LayerNormBackward<T>& a, int64_t row, RowPair<T, N, VECTORS>& to) {
  const int lanes = lanes_of_row<WIDE>(), lane = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int column = (v * lanes + lane) * N;
    if (row >= a.rows || column >= a.cols) continue;
    to.dy[v] = read<T, N>(a.dy + row * a.cols + column);
    to.x[v] = read<T, N>(a.x + row * a.cols + column);
  }
}

// The column sums of one thread: in registers, or (SHARED) in its own columns of shared memory.
template <int SUMS, int VECTORS, int N, bool SHARED>
struct ColumnSums {
  float value[SHARED ? 1 : SUMS][VECTORS][N];
  float* shared;
  int cols;

  MX_DEVICE void clear(float* memory, int columns, int sums) {
    shared = memory;
    cols = columns;
    const int lanes = lanes_of_row<SHARED>(), lane = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = (v * lanes + lane) * N;
      for (int s = 0; s < (SHARED ? sums : 0); ++s)
        for (int k = 0; k < N && column < cols; ++k) shared[s * cols + column + k] = 0.f;
#pragma unroll
      for (int s = 0; s < (SHARED ? 0 : SUMS); ++s)
#pragma unroll
        for (int k = 0; k < N; ++k) value[s][v][k] = 0.f;
    }
  }

  MX_DEVICE void add(int s, int v, int column, const float (&term)[N]) {
    if constexpr (SHARED) {
#pragma unroll
      for (int part = 0; part < N; part += 4) {
        Pack<float, 4>& sum = *reinterpret_cast<Pack<float, 4>*>(shared + s * cols + column + part);
        Pack<float, 4> now = sum;
#pragma unroll
        for (int k = 0; k < 4; ++k) now.word[k] += term[part + k];
        sum = now;
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) value[s][v][k] += term[k];
    }
  }

  // Writes the block's sums to workspace [s][blockIdx.x][column]; rows of the block are added in order.
  MX_DEVICE void finish(float* workspace, int sums) {
    const int lanes = lanes_of_row<SHARED>(), lane = static_cast<int>(threadIdx.x);
    const int groups = static_cast<int>(blockDim.y), group = static_cast<int>(threadIdx.y);
#pragma unroll
    for (int s = 0; s < SUMS; ++s) {
      if (s >= sums) break;
      float* to = workspace + (static_cast<int64_t>(s) * gridDim.x + blockIdx.x) * cols;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int column = (v * lanes + lane) * N;
        if (column >= cols) continue;
#pragma unroll
        for (int part = 0; part < N; part += 4) {
          Pack<float, 4> sum;
#pragma unroll
          for (int k = 0; k < 4; ++k)
            sum.word[k] = SHARED ? shared[s * cols + column + part + k] : value[SHARED ? 0 : s][v][part + k];
          if (SHARED || groups == 1) {
            *reinterpret_cast<Pack<float, 4>*>(to + column + part) = sum;
          } else {
            *reinterpret_cast<Pack<float, 4>*>(shared + group * cols + column + part) = sum;
          }
        }
      }
      if (SHARED || groups == 1) continue;
      __syncthreads();
      for (int column = group * lanes + lane; column < cols; column += groups * lanes) {
        float sum = shared[column];
        for (int other = 1; other < groups; ++other) sum += shared[other * cols + column];
        to[column] = sum;
      }
      __syncthreads();
    }
  }
};

template <class T, int PER_LANE, bool ADD>
__global__ void __launch_bounds__(512) layer_norm_backward_kernel(LayerNormBackward<T> a) {
  constexpr int N = kVector<T>, VECTORS = PER_LANE / N, SUMS = ADD ? 3 : 2;
  constexpr bool SHARED = PER_LANE > 16, AHEAD = sizeof(T) == 2 && !ADD && !SHARED;
  // With float32 the registers of dy and x take g and x_hat instead; with 16 bits those are found a second time.
  constexpr bool IN_PLACE = sizeof(T) == 4;
  MX_SHARED(float, scratch, [2 * 2 * kMaxWarps]);
  MX_DYNAMIC_SHARED(float, memory);
  const int lanes = lanes_of_row<SHARED>(), lane = static_cast<int>(threadIdx.x);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const float inverse = 1.f / static_cast<float>(a.cols);
  const uint64_t seed = ADD ? read_seed(a.dropout, a.seed) : 0;

  ColumnSums<SUMS, VECTORS, N, SHARED> columns;
  columns.clear(memory, a.cols, a.sums);
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  RowPair<T, N, VECTORS> pair, next;
  read_pair<SHARED>(a, row, pair);
  int parity = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < a.rows; first += step, row += step) {
    if constexpr (AHEAD) read_pair<SHARED>(a, row + step, next);
    const bool live = row < a.rows;
    const float rstd = live ? a.rstd[row] : 0.f;
    const float mean = live ? a.mean[row] : 0.f;

    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = (v * lanes + lane) * N;
      if (!live || column >= a.cols) continue;
      float dy[N], x[N], weight[N];
      unpack(pair.dy[v], dy);
      unpack(pair.x[v], x);
      load_weights<T, N>(a.weight, column, weight);
      columns.add(1, v, column, dy);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        x[k] = (x[k] - mean) * rstd;
        const float g = dy[k] * weight[k];
        sums[0] += g;
        sums[1] += g * x[k];
        dy[k] *= x[k];
        if constexpr (IN_PLACE) {
          pair.dy[v].word[k] = g;
          pair.x[v].word[k] = x[k];
        }
      }
      columns.add(0, v, column, dy);
    }
    reduce_row<Sum>(sums, scratch + parity * 2 * kMaxWarps);
    parity ^= 1;
    const float average = sums[0] * inverse, slope = sums[1] * inverse;

#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int column = (v * lanes + lane) * N;
      if (!live || column >= a.cols) continue;
      const int64_t at = row * a.cols + column;
      float out[N], x[N];
      unpack(pair.dy[v], out);
      unpack(pair.x[v], x);
      if constexpr (!IN_PLACE) {
        float weight[N];
        load_weights<T, N>(a.weight, column, weight);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          x[k] = (x[k] - mean) * rstd;
          out[k] *= weight[k];
        }
      }
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = rstd * (out[k] - average - x[k] * slope);
      if (ADD && a.dsum) {
        load<T, N>(a.dsum + at, x);
#pragma unroll
        for (int k = 0; k < N; ++k) out[k] += x[k];
      }
      store<T, N>(a.dx + at, out);
      if constexpr (ADD) {
        if (a.dropout.threshold) {
          apply_dropout<N>(a.dropout, seed, at, out);
          store<T, N>(a.dropped + at, out);
        }
        if (a.sums == 3) columns.add(2, v, column, out);
      }
    }
    if constexpr (AHEAD) {
      pair = next;
    } else {
      read_pair<SHARED>(a, row + step, pair);
    }
  }
  columns.finish(a.workspace, a.sums);
}

template <class T, bool ADD>
__global__ void __launch_bounds__(kBackwardBlock, 1) layer_norm_backward_loop_kernel(LayerNormBackward<T> a) {
  MX_SHARED(float, scratch, [2 * 2 * kMaxWarps]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t plane = static_cast<int64_t>(gridDim.x) * a.cols;
  const uint64_t seed = ADD ? read_seed(a.dropout, a.seed) : 0;
  float* const columns = a.workspace + static_cast<int64_t>(blockIdx.x) * a.cols;
  for (int column = thread; column < a.cols; column += kBackwardBlock)
    for (int s = 0; s < a.sums; ++s) columns[s * plane + column] = 0.f;

  int parity = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t start = row * a.cols;
    const float rstd = a.rstd[row], mean = a.mean[row];
    float sums[2] = {0.f, 0.f};
    for (int column = thread; column < a.cols; column += kBackwardBlock) {
      float weight[1];
      load_weights<T, 1>(a.weight, column, weight);
      const float dy = to_float(a.dy[start + column]);
      const float x = (to_float(a.x[start + column]) - mean) * rstd;
      sums[0] += dy * weight[0];
      sums[1] += dy * weight[0] * x;
      columns[column] += dy * x;
      columns[plane + column] += dy;
    }
    reduce_row<Sum>(sums, scratch + parity * 2 * kMaxWarps);
    parity ^= 1;
    const float average = sums[0] / static_cast<float>(a.cols), slope = sums[1] / static_cast<float>(a.cols);
    for (int column = thread; column < a.cols; column += kBackwardBlock) {
      float weight[1], out[1];
      load_weights<T, 1>(a.weight, column, weight);
      const float x = (to_float(a.x[start + column]) - mean) * rstd;
      out[0] = rstd * (to_float(a.dy[start + column]) * weight[0] - average - x * slope);
      if (ADD && a.dsum) out[0] += to_float(a.dsum[start + column]);
      store<T, 1>(a.dx + start + column, out);
      if constexpr (ADD) {
        if (a.dropout.threshold) {
          apply_dropout<1>(a.dropout, seed, start + column, out);
          store<T, 1>(a.dropped + start + column, out);
        }
        if (a.sums == 3) columns[2 * plane + column] += out[0];
      }
    }
  }
}

// Launches one of the kernels above and the sum over partitions; arguments have been checked.
template <class T, bool ADD>
int launch_layer_norm_backward(const LayerNormBackward<T>& a, int weight_dtype, void* const (&results)[3],
                               int64_t partitions, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(partitions));
  bool vectors = a.cols <= kMaxRegisterColumns && a.cols % kVector<T> == 0 &&
                 aligned(a.dy, a.dsum, a.x, a.weight.data, a.dx, a.dropped, a.workspace);
  if (vectors && a.cols <= kMaxRegisterColumns / 2) {
    const RowShape shape = row_shape(a.cols, 16, kBackwardBlock);
    const size_t bytes = shape.rows > 1 ? shape.rows * a.cols * sizeof(float) : 0;
    MX_LAUNCH((layer_norm_backward_kernel<T, 16, ADD>), grid, dim3(shape.lanes, shape.rows), bytes, stream, a);
  } else if (vectors) {
    const size_t bytes = static_cast<size_t>(a.sums) * a.cols * sizeof(float);
    vectors = allow_shared(layer_norm_backward_kernel<T, 32, ADD>, bytes);
    if (vectors) {
      MX_LAUNCH((layer_norm_backward_kernel<T, 32, ADD>), grid, dim3(kWideBlock), bytes, stream, a);
    }
  }
  if (!vectors) {
    MX_LAUNCH((layer_norm_backward_loop_kernel<T, ADD>), grid, dim3(kBackwardBlock), 0, stream, a);
  }
  const int status = MX_LAST_ERROR();
  if (status != 0) return status;
  return sum_columns(a.workspace, results, a.sums, weight_dtype, partitions, a.cols, stream);
}

}  // namespace mx
