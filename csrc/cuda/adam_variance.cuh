// The two statistics of Adam's second moment that go with instability: sum of sqrt(v) and max of sqrt(v).
//
// Layout: v [count], read once. Threads to data: thread t of block b takes vectors of 16 bytes t + 512 b, then every
// (512 * blocks)-th, kRootsAhead of them at a time, and adds in float64; single elements up to the first multiple of 16
// bytes and behind the last are the first block's. Blocks write to workspace [2][blocks], and one block adds
// those in one order. A NaN in v makes both results NaN.
#pragma once
#include "dispatch.h"

namespace mx {

constexpr int kRootsBlock = 512, kRootsAhead = 4;

struct Roots {
  double sum;
  double largest;
};

// fmax would drop a NaN.
MX_DEVICE double larger(double a, double b) { return a > b || a != a ? a : b; }

MX_DEVICE void take_root(Roots& roots, float value) {
  const double root = static_cast<double>(sqrtf(value));
  roots.sum += root;
  roots.largest = larger(roots.largest, root);
}

// Puts the threads' pairs together; the result is thread 0's.
MX_DEVICE Roots reduce_roots(Roots roots) {
  MX_SHARED(Roots, partial, [kRootsBlock / 32]);
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    roots.sum += __shfl_xor_sync(kFullWarp, roots.sum, offset);
    roots.largest = larger(roots.largest, __shfl_xor_sync(kFullWarp, roots.largest, offset));
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % 32 == 0) partial[thread / 32] = roots;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kRootsBlock / 32; ++warp) {
      roots.sum += partial[warp].sum;
      roots.largest = larger(roots.largest, partial[warp].largest);
    }
  }
  return roots;
}

template <class T>
__global__ void __launch_bounds__(kRootsBlock)
    adam_variance_kernel(const T* __restrict__ v, double* __restrict__ workspace, int64_t head, int64_t vectors,
                         int64_t count) {
  constexpr int N = kVector<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRootsBlock;
  const T* body = v + head;
  Roots roots{0., 0.};
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kRootsBlock + threadIdx.x; at < vectors;
       at += kRootsAhead * step) {
    Pack<T, N> in[kRootsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kRootsAhead; ++ahead)
      if (at + ahead * step < vectors) in[ahead] = read<T, N>(body + (at + ahead * step) * N);
#pragma unroll
    for (int ahead = 0; ahead < kRootsAhead; ++ahead) {
      if (at + ahead * step >= vectors) break;
#pragma unroll
      for (int k = 0; k < N; ++k) take_root(roots, in[ahead].get(k));
    }
  }
  if (blockIdx.x == 0) {
    const int64_t tail = head + vectors * N + threadIdx.x;
    if (threadIdx.x < head) take_root(roots, to_float(v[threadIdx.x]));
    if (tail < count) take_root(roots, to_float(v[tail]));
  }
  roots = reduce_roots(roots);
  if (threadIdx.x == 0) {
    workspace[blockIdx.x] = roots.sum;
    workspace[gridDim.x + blockIdx.x] = roots.largest;
  }
}

__global__ void __launch_bounds__(kRootsBlock)
    adam_variance_total_kernel(const double* __restrict__ workspace, double* __restrict__ result, int64_t partitions) {
  Roots roots{0., 0.};
  for (int64_t p = threadIdx.x; p < partitions; p += kRootsBlock) {
    roots.sum += workspace[p];
    roots.largest = larger(roots.largest, workspace[partitions + p]);
  }
  roots = reduce_roots(roots);
  if (threadIdx.x == 0) {
    result[0] = roots.sum;
    result[1] = roots.largest;
  }
}

}  // namespace mx
