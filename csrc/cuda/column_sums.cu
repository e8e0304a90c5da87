// result[c] = sum over p of workspace [p][c], for up to three workspaces of one shape.
//
// Threads to data: a block has 32 columns, threadIdx.x, and 16 threads for each, of which y adds partitions y, y + 16, ...
// in that order; the 16 are added in order too. blockIdx.y picks the sum. A warp reads 128 neighbouring bytes.
#include "column_sums.h"

#include "dispatch.h"

namespace mx {

constexpr int kSumWidth = 32, kSumDepth = 16;

// Groups of rows for a backward pass: two blocks for each of an H100's 132 multiprocessors, one where a row takes more
// than half of a multiprocessor's registers. A constant, not the device's own number: results depend on the shape alone.
constexpr int64_t kPartitions = 264;
constexpr int64_t kWideColumns = 4096;

struct SumResults {
  void* of[3];
};

__global__ void __launch_bounds__(kSumWidth* kSumDepth)
    sum_columns_kernel(const float* __restrict__ workspace, SumResults results, int dtype, int partitions,
                       int64_t cols) {
  MX_SHARED(float, partial, [kSumDepth][kSumWidth]);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumWidth + threadIdx.x;
  const float* from = workspace + static_cast<int64_t>(blockIdx.y) * partitions * cols + column;
  float sum = 0.f;
  if (column < cols) {
#pragma unroll 4
    for (int p = static_cast<int>(threadIdx.y); p < partitions; p += kSumDepth) sum += from[p * cols];
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  void* const result = blockIdx.y == 0 ? results.of[0] : blockIdx.y == 1 ? results.of[1] : results.of[2];
  if (threadIdx.y != 0 || column >= cols || result == nullptr) return;
  for (int y = 1; y < kSumDepth; ++y) sum += partial[y][threadIdx.x];
  if (dtype == MX_FLOAT32) {
    static_cast<float*>(result)[column] = sum;
  } else if (dtype == MX_FLOAT16) {
    static_cast<__half*>(result)[column] = from_float<__half>(sum);
  } else {
    static_cast<__nv_bfloat16*>(result)[column] = from_float<__nv_bfloat16>(sum);
  }
}

int sum_columns(const float* workspace, void* const (&results)[3], int sums, int dtype, int64_t partitions, int64_t cols,
                cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(cols, kSumWidth)), static_cast<unsigned>(sums));
  MX_LAUNCH(sum_columns_kernel, grid, dim3(kSumWidth, kSumDepth), 0, stream, workspace,
            (SumResults{{results[0], results[1], results[2]}}), dtype, static_cast<int>(partitions), cols);
  return MX_LAST_ERROR();
}

}  // namespace mx

extern "C" int64_t mx_cuda_partitions(int64_t rows, int64_t cols) {
  const int64_t most = cols > mx::kWideColumns ? mx::kPartitions / 2 : mx::kPartitions;
  return rows < 1 ? 1 : rows < most ? rows : most;
}
