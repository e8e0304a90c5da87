// Cross-entropy over one rank's slice of the vocabulary, in two halves with the ranks' exchange between them:
//
//   forward    maximum = max logit, total = sum exp(logit - maximum), target = the label's logit, over the real columns
//   backward   logit = grad * (exp(logit - maximum) / total - [id == label]), 0 in the padding, in place
//
// Layout: logits [rows, cols], row by row; the first `real` columns are ids first .. first + real - 1. Saved: maximum and
// total; the gradient takes the logits' place, so no second [rows, cols] tensor is ever in memory. Threads have rows. A row
// of a large vocabulary does not stay in the caches, so it is read once, in pieces that do: a piece with a new maximum
// rescales the sum so far.
#include "elementary.h"
#include "parallel.h"

namespace mx::cpu {
namespace {

constexpr int64_t kPiece = 2048;

struct Slice {
  int64_t first;
  int64_t real;
  int64_t cols;

  bool ok() const { return real >= 0 && real <= cols; }
  // The label's column, or -1 where another rank has it.
  int64_t column(int64_t label) const { return label >= first && label - first < real ? label - first : -1; }
};

struct RowSums {
  float maximum;
  float total;
};

template <class T>
MX_INLINE RowSums sum_logits(const T* logits, int64_t real) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  RowSums row{kNothing, 0.f};
  for (int64_t begin = 0; begin < real; begin += kPiece) {
    const int64_t count = std::min(kPiece, real - begin);
    const T* const piece = logits + begin;
    Maximum highest;
    for_vectors(count, [&](int64_t c, auto lanes, int chain) {
      highest.chain[chain] = maximum(keep(load(piece + c, lanes), broadcast(kNothing), lanes), highest.chain[chain]);
    });
    const float higher = std::max(row.maximum, highest.total());
    // A piece of -inf has no distance to its maximum; NaN, which is no maximum, must still reach the sum.
    const float shift = higher == kNothing ? 0.f : higher;
    Sum sum;
    for_vectors(count, [&](int64_t c, auto lanes, int chain) {
      sum.chain[chain] += keep(exp_to_zero(load(piece + c, lanes) - shift), Floats{}, lanes);
    });
    if (higher > row.maximum) row.total *= exp_to_zero(broadcast(row.maximum - shift))[0];
    row = {higher, row.total + sum.total()};
  }
  return row;
}

// logit = factor * exp(logit - maximum) in the real columns, 0 in the padding.
template <class T>
MX_INLINE void gradient_row(T* logits, const Slice& slice, float maximum, float factor) {
  for_vectors(slice.real, [&](int64_t c, auto lanes, int) {
    store(logits + c, factor * exp_to_zero(load(logits + c, lanes) - maximum), lanes);
  });
  std::memset(logits + slice.real, 0, static_cast<size_t>(slice.cols - slice.real) * sizeof(T));
}

template <class T>
MX_INLINE float element(const T* row, int64_t column) {
  return load(row + column, Part{1})[0];
}

template <class T>
void forward(const T* logits, const int64_t* labels, float* maximum, float* total, float* target, const Slice& slice,
             int64_t rows, mx_parallel_for executor) {
  parallel(executor, rows, row_grain(slice.cols, kDearGrain), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const from = logits + row * slice.cols;
      const RowSums of = sum_logits(from, slice.real);
      const int64_t column = slice.column(labels[row]);
      maximum[row] = of.maximum;
      total[row] = of.total;
      target[row] = column < 0 ? 0.f : element(from, column);
    }
  });
}

template <class T>
void backward(T* logits, const int64_t* labels, const float* maximum, const float* total, const float* grad,
              const Slice& slice, int64_t rows, mx_parallel_for executor) {
  parallel(executor, rows, row_grain(slice.cols, kDearGrain), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* const to = logits + row * slice.cols;
      const int64_t column = slice.column(labels[row]);
      const float label = column < 0 ? 0.f : element(to, column), factor = grad[row] / total[row];
      gradient_row(to, slice, maximum[row], factor);
      if (column < 0) continue;
      // The difference before it is rounded: of a label that is nearly certain little is left.
      const Floats e = exp_to_zero(broadcast(label - maximum[row]));
      store(to + column, broadcast(factor * (e[0] - total[row])), Part{1});
    }
  });
}

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_cross_entropy_forward(int dtype, const void* logits, const int64_t* labels, float* maximum,
                                            float* total, float* target, int64_t first, int64_t real, int64_t rows,
                                            int64_t cols, mx_parallel_for executor) {
  const Slice slice{first, real, cols};
  if (!shape_ok(rows, cols) || !slice.ok()) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    forward(at<T>(logits, 0), labels, maximum, total, target, slice, rows, executor);
  });
}

extern "C" int mx_cpu_cross_entropy_backward(int dtype, void* logits, const int64_t* labels, const float* maximum,
                                             const float* total, const float* grad, int64_t first, int64_t real,
                                             int64_t rows, int64_t cols, mx_parallel_for executor) {
  const Slice slice{first, real, cols};
  if (!shape_ok(rows, cols) || !slice.ok()) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    backward(at<T>(logits, 0), labels, maximum, total, grad, slice, rows, executor);
  });
}
