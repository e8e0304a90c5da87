// Cross-entropy over one tensor rank's slice of the vocabulary, forward and (in place) backward:
//
//   maximum = max_c x_c,   total = sum_c exp(x_c - maximum),   target = x_label where the label is in the slice, else 0
//   x_c <- grad * (exp(x_c - maximum) / total - [c is the label]),   0 in the padding
//
// so that loss = log(total) + maximum - target once the ranks' results are put together, and logits and their gradient are
// never both in memory.
//
// Layout: logits [rows, cols], of which `real` columns are ids first .. first + real - 1. Threads to data: a row is a
// block's; its threads take vectors of 16 bytes in turn, kAhead of them at a time, and single elements up to the first
// multiple of 16 bytes and behind the last (an odd vocabulary has rows that begin anywhere). Forward, a thread keeps a
// running maximum and the sum of exponentials below it, and the block puts these pairs together in one order: one read.
#pragma once
#include "dispatch.h"

namespace mx {

constexpr int kEntropyBlock = 256, kAhead = 4;

// The running maximum of what was seen, and the sum of exp(value - maximum). Nothing seen: -inf and 0.
struct Online {
  float maximum;
  float total;
};

// 0 where a part saw nothing (or only -inf), so that -inf minus -inf does not come up.
MX_DEVICE float below(float value, float maximum) { return value == -INFINITY ? 0.f : __expf(value - maximum); }

MX_DEVICE Online merge(Online a, Online b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  return {maximum, a.total * below(a.maximum, maximum) + b.total * below(b.maximum, maximum)};
}

template <int N>
MX_DEVICE void see(Online& online, const float (&value)[N]) {
  float maximum = online.maximum;
#pragma unroll
  for (int k = 0; k < N; ++k) maximum = fmaxf(maximum, value[k]);
  online.total *= below(online.maximum, maximum);
#pragma unroll
  for (int k = 0; k < N; ++k) online.total += below(value[k], maximum);
  online.maximum = maximum;
}

// Where vectors begin in a row of `count` elements at `row`, and how many there are.
struct Peeled {
  int64_t head;
  int64_t vectors;
};

template <class T>
MX_DEVICE Peeled peel(const T* row, int64_t count) {
  const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int64_t head = offset == 0 ? 0 : kVector<T> - offset;
  if (head >= count) return {count, 0};
  return {head, (count - head) / kVector<T>};
}

template <class T>
__global__ void __launch_bounds__(kEntropyBlock)
    cross_entropy_forward_kernel(const T* __restrict__ logits, const int64_t* __restrict__ labels,
                                 float* __restrict__ maximum, float* __restrict__ total, float* __restrict__ target,
                                 int64_t first, int64_t real, int64_t cols) {
  constexpr int N = kVector<T>;
  MX_SHARED(Online, partial, [kMaxWarps]);
  const T* row = logits + blockIdx.x * cols;
  const int thread = static_cast<int>(threadIdx.x);
  const Peeled part = peel(row, real);
  const T* body = row + part.head;
  Online online{-INFINITY, 0.f};

  for (int64_t v = thread; v < part.vectors; v += kAhead * kEntropyBlock) {
    Pack<T, N> in[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead)
      if (v + ahead * kEntropyBlock < part.vectors) in[ahead] = read<T, N>(body + (v + ahead * kEntropyBlock) * N);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (v + ahead * kEntropyBlock >= part.vectors) break;
      float value[N];
      unpack(in[ahead], value);
      see(online, value);
    }
  }
  float single[1];
  if (thread < part.head) {
    single[0] = to_float(row[thread]);
    see(online, single);
  }
  const int64_t tail = part.head + part.vectors * N + thread;
  if (tail < real) {
    single[0] = to_float(row[tail]);
    see(online, single);
  }

#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const Online other{__shfl_xor_sync(kFullWarp, online.maximum, offset),
                       __shfl_xor_sync(kFullWarp, online.total, offset)};
    online = merge(online, other);
  }
  if (thread % 32 == 0) partial[thread / 32] = online;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < kEntropyBlock / 32; ++warp) online = merge(online, partial[warp]);
  maximum[blockIdx.x] = online.maximum;
  total[blockIdx.x] = online.total;
  const int64_t label = labels[blockIdx.x] - first;
  target[blockIdx.x] = label >= 0 && label < real ? to_float(row[label]) : 0.f;
}

// What a row's elements become.
struct RowGradient {
  float maximum;
  float scale;  // grad / total
  float grad;
  int64_t label;
  int64_t real;

  MX_DEVICE float of(float value, int64_t column) const {
    if (column >= real) return 0.f;
    return __expf(value - maximum) * scale - (column == label ? grad : 0.f);
  }
};

template <class T>
__global__ void __launch_bounds__(kEntropyBlock)
    cross_entropy_backward_kernel(T* logits, const int64_t* __restrict__ labels, const float* __restrict__ maximum,
                                  const float* __restrict__ total, const float* __restrict__ grad, int64_t first,
                                  int64_t real, int64_t cols) {
  constexpr int N = kVector<T>;
  T* row = logits + blockIdx.x * cols;
  const int thread = static_cast<int>(threadIdx.x);
  const Peeled part = peel<T>(row, cols);
  T* body = row + part.head;
  const float upstream = grad[blockIdx.x];
  const RowGradient gradient{maximum[blockIdx.x], upstream / total[blockIdx.x], upstream, labels[blockIdx.x] - first,
                             real};

  for (int64_t v = thread; v < part.vectors; v += kAhead * kEntropyBlock) {
    Pack<T, N> in[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead)
      if (v + ahead * kEntropyBlock < part.vectors) in[ahead] = read<T, N>(body + (v + ahead * kEntropyBlock) * N);
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int64_t at = (v + ahead * kEntropyBlock) * N;
      if (v + ahead * kEntropyBlock >= part.vectors) break;
      float value[N];
      unpack(in[ahead], value);
#pragma unroll
      for (int k = 0; k < N; ++k) value[k] = gradient.of(value[k], part.head + at + k);
      store<T, N>(body + at, value);
    }
  }
  const int64_t tail = part.head + part.vectors * N + thread;
  if (thread < part.head) row[thread] = from_float<T>(gradient.of(to_float(row[thread]), thread));
  if (tail < cols) row[tail] = from_float<T>(gradient.of(to_float(row[tail]), tail));
}

}  // namespace mx
