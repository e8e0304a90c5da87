// Scaled causal softmax: probs[i, j] = exp(scale * scores[i, j] - max) / sum over j <= i + sk - sq, and 0 beyond.
//
//   dscores = scale * probs * (dy' - sum(dy' * probs)),  dy' = dropout'(dy)
//
// Layout: [batch, sq, sk], row by row. Only what the mask leaves is computed; half of the matrix is nothing but zeros to be
// written. Saved: probs; the dropout mask is drawn again from the seed. Threads have rows: the first and the last of a
// matrix together, the second and the last but one..., so that two threads have as much to do where matrices are few.
#include "softmax.h"

namespace mx::cpu {
namespace {

// Matrices from which on threads share them out whole, and rows follow each other in memory.
constexpr int64_t kManyMatrices = 256;

struct Shape {
  int64_t batch;
  int64_t sq;
  int64_t sk;

  bool ok() const { return batch >= 0 && sq > 0 && sk >= sq; }

  // work(row, its columns, noise) for every row.
  template <class Work>
  void for_rows(mx_parallel_for executor, float dropout, const int64_t* seed, const Work& work) const {
    const int64_t rows = batch * sq;
    if (batch >= kManyMatrices || sq == 1) {
      parallel(executor, rows, row_grain(sk, kDearGrain), [&](int64_t begin, int64_t end) {
        Noise noise(dropout, seed);
        int64_t query = begin % sq;
        for (int64_t row = begin; row < end; ++row, query = query + 1 == sq ? 0 : query + 1)
          work(row, Columns{query + 1 + sk - sq, sk}, noise);
      });
      return;
    }
    const int64_t pairs = (sq + 1) / 2;
    parallel(executor, batch * pairs, row_grain(2 * sk, kDearGrain), [&](int64_t begin, int64_t end) {
      Noise noise(dropout, seed);
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t first = pair / pairs * sq, low = pair % pairs, high = sq - 1 - low;
        work(first + low, Columns{low + 1 + sk - sq, sk}, noise);
        if (high > low) work(first + high, Columns{high + 1 + sk - sq, sk}, noise);
      }
    });
  }
};

template <class T>
void forward(const T* scores, T* probs, T* dropped, float scale, float dropout, const int64_t* seed, const Shape& shape,
             mx_parallel_for executor) {
  shape.for_rows(executor, dropout, seed, [&](int64_t row, const Columns& columns, Noise& noise) {
    const int64_t first = row * shape.sk;
    const T* const from = scores + first;
    softmax_row(probs + first, columns,
                [&](int64_t c, auto lanes, float shift) { return scaled(from + c, lanes, scale) - shift; });
    if (dropout > 0.f) drop_row(probs + first, dropped + first, columns, noise, first);
  });
}

template <class T>
void backward(const T* dy, const T* probs, T* dscores, float scale, float dropout, const int64_t* seed, const Shape& shape,
              mx_parallel_for executor) {
  shape.for_rows(executor, dropout, seed, [&](int64_t row, const Columns& columns, Noise& noise) {
    const int64_t first = row * shape.sk;
    if (dropout > 0.f)
      return dropped_backward_row(dy + first, probs + first, dscores + first, columns, scale, noise, first);
    softmax_backward_row(dy + first, probs + first, dscores + first, columns, scale);
  });
}

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_causal_softmax_forward(int dtype, const void* scores, void* probs, void* dropped, float scale,
                                             float dropout, const int64_t* seed, int64_t batch, int64_t sq, int64_t sk,
                                             mx_parallel_for executor) {
  const Shape shape{batch, sq, sk};
  if (sk > kMaxKeys) return MX_UNSUPPORTED;
  if (!shape.ok() || !dropout_ok(dropout, seed) || (dropout > 0.f && !dropped)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    forward(at<T>(scores, 0), at<T>(probs, 0), at<T>(dropped, 0), scale, dropout, seed, shape, executor);
  });
}

extern "C" int mx_cpu_causal_softmax_backward(int dtype, const void* dy, const void* probs, void* dscores, float scale,
                                              float dropout, const int64_t* seed, int64_t batch, int64_t sq, int64_t sk,
                                              mx_parallel_for executor) {
  const Shape shape{batch, sq, sk};
  if (sk > kMaxKeys) return MX_UNSUPPORTED;
  if (!shape.ok() || !dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    backward(at<T>(dy, 0), at<T>(probs, 0), at<T>(dscores, 0), scale, dropout, seed, shape, executor);
  });
}
