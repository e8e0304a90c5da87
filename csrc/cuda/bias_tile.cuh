// How the ops that add a bias walk over a matrix [rows, cols].
//
// Threads to data: threadIdx.x of a block (32, 8) has N neighbouring columns, and with them their bias, for its whole life;
// threadIdx.y and blockIdx.y walk down the rows. A thread requests kRowsAhead rows before it works on the first, so that
// enough of memory is asked for at once. A warp reads 512 neighbouring bytes where 16-byte vectors fit (N > 1).
#pragma once
#include "column_sums.h"
#include "dispatch.h"

namespace mx {

constexpr int kTileLanes = 32, kTileRows = 8, kRowsAhead = 4;
// Blocks that fill a large device several times over; more only make the sums of columns longer.
constexpr int64_t kTileBlocks = 4224;

struct TileRows {
  int64_t first;  // of the thread
  int64_t step;   // from one of its rows to the next
  int64_t column;
};

template <int N>
MX_DEVICE TileRows tile_rows() {
  return {static_cast<int64_t>(blockIdx.y) * kTileRows + threadIdx.y, static_cast<int64_t>(gridDim.y) * kTileRows,
          (static_cast<int64_t>(blockIdx.x) * kTileLanes + threadIdx.x) * N};
}

template <class T, int N>
MX_DEVICE void load_bias(const Weights& bias, int64_t column, int64_t cols, float (&to)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = 0.f;
  if (bias.data && column < cols) load_weights<T, N>(bias, column, to);
}

// Adds a block's sums in the order of threadIdx.y and writes them to workspace [blockIdx.y][column]. All threads come here.
template <int N>
MX_DEVICE void write_column_sums(const float (&sum)[N], float* workspace, int64_t column, int64_t cols) {
  MX_SHARED(float, partial, [kTileRows][kTileLanes * N]);
#pragma unroll
  for (int k = 0; k < N; ++k) partial[threadIdx.y][threadIdx.x * N + k] = sum[k];
  __syncthreads();
  const int64_t first = column - static_cast<int64_t>(threadIdx.x) * N;
  for (int c = static_cast<int>(threadIdx.y) * kTileLanes + static_cast<int>(threadIdx.x); c < kTileLanes * N;
       c += kTileLanes * kTileRows) {
    if (first + c >= cols) continue;
    float total = partial[0][c];
#pragma unroll
    for (int y = 1; y < kTileRows; ++y) total += partial[y][c];
    workspace[blockIdx.y * cols + first + c] = total;
  }
}

// Blocks (columns, rows) for a matrix; with column sums no more rows of blocks than there are partitions.
struct TileGrid {
  int64_t across;
  int64_t down;
};

template <int N>
TileGrid tile_grid(int64_t rows, int64_t cols, int64_t partitions) {
  const int64_t across = ceil_div(cols, kTileLanes * N), useful = ceil_div(rows, kTileRows * kRowsAhead);
  int64_t down = kTileBlocks / across;
  if (down > partitions) down = partitions;
  if (down > useful) down = useful;
  return {across, down < 1 ? 1 : down};
}

// Without column sums: the largest grid in y.
constexpr int64_t kAnyPartitions = 65535;

}  // namespace mx
