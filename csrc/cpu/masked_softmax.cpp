// Scaled masked softmax: probs[i, j] = exp(scale * scores[i, j] - max) / sum over the j that mask[i, j] leaves (0), and 0
// elsewhere; a row of which it leaves nothing has probabilities 0.
//
//   dscores = scale * probs * (dy' - sum(dy' * probs)),  dy' = dropout'(dy)
//
// Layout: scores [batch, heads, sq, sk], mask [mask_batch, 1, sq, sk], row by row. The backward pass needs no mask: where it
// hides, probs is 0. Saved: probs; the dropout mask is drawn again from the seed. Threads have rows.
#include "softmax.h"

namespace mx::cpu {
namespace {

MX_INLINE Bytes load_mask(const uint8_t* from, Full) {
  Bytes v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
MX_INLINE Bytes load_mask(const uint8_t* from, Inside) { return load_mask(from, Full{}); }
MX_INLINE Bytes load_mask(const uint8_t* from, Part lanes) {
  uint8_t part[kLanes] = {};
  copy_part(part, from, lanes.count);
  return load_mask(part, Full{});
}

// The row of the mask that belongs to a row of the scores.
struct Masks {
  const uint8_t* mask;
  int64_t heads;
  int64_t sq;
  int64_t sk;
  bool shared;

  const uint8_t* row(int64_t row) const {
    const int64_t batch = shared ? 0 : row / (heads * sq);
    return mask + (batch * sq + row % sq) * sk;
  }
  bool hides_all(const uint8_t* row) const {
    return std::all_of(row, row + sk, [](uint8_t hidden) { return hidden != 0; });
  }
};

template <class T>
void forward(const T* scores, const Masks& masks, T* probs, T* dropped, float scale, float dropout, const int64_t* seed,
             int64_t rows, mx_parallel_for executor) {
  const Floats nothing = broadcast(-std::numeric_limits<float>::infinity());
  const Columns columns{masks.sk, masks.sk};
  parallel(executor, rows, row_grain(masks.sk, kDearGrain), [&](int64_t begin, int64_t end) {
    Noise noise(dropout, seed);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * masks.sk;
      const T* const from = scores + first;
      const uint8_t* const hidden = masks.row(row);
      if (hidden[0] && masks.hides_all(hidden)) {
        std::memset(probs + first, 0, static_cast<size_t>(masks.sk) * sizeof(T));
      } else {
        softmax_row(probs + first, columns, [&](int64_t c, auto lanes, float shift) {
          const Ints left = __builtin_convertvector(load_mask(hidden + c, lanes), Ints) == 0;
          return left ? scaled(from + c, lanes, scale) - shift : nothing;
        });
      }
      if (dropout > 0.f) drop_row(probs + first, dropped + first, columns, noise, first);
    }
  });
}

template <class T>
void backward(const T* dy, const T* probs, T* dscores, float scale, float dropout, const int64_t* seed, int64_t rows,
              int64_t cols, mx_parallel_for executor) {
  const Columns columns{cols, cols};
  parallel(executor, rows, row_grain(cols, kDearGrain), [&](int64_t begin, int64_t end) {
    Noise noise(dropout, seed);
    for (int64_t first = begin * cols; first < end * cols; first += cols) {
      if (dropout > 0.f) {
        dropped_backward_row(dy + first, probs + first, dscores + first, columns, scale, noise, first);
      } else {
        softmax_backward_row(dy + first, probs + first, dscores + first, columns, scale);
      }
    }
  });
}

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_masked_softmax_forward(int dtype, const void* scores, const uint8_t* mask, void* probs, void* dropped,
                                             float scale, float dropout, const int64_t* seed, int64_t batch, int64_t heads,
                                             int64_t sq, int64_t sk, int64_t mask_batch, mx_parallel_for executor) {
  if (sk > kMaxKeys) return MX_UNSUPPORTED;
  if (batch < 0 || heads <= 0 || sq <= 0 || sk <= 0 || (mask_batch != 1 && mask_batch != batch)) return MX_BAD_ARGUMENT;
  if (!mask || !dropout_ok(dropout, seed) || (dropout > 0.f && !dropped)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const Masks masks{mask, heads, sq, sk, mask_batch == 1};
    forward(at<T>(scores, 0), masks, at<T>(probs, 0), at<T>(dropped, 0), scale, dropout, seed, batch * heads * sq, executor);
  });
}

extern "C" int mx_cpu_masked_softmax_backward(int dtype, const void* dy, const void* probs, void* dscores, float scale,
                                              float dropout, const int64_t* seed, int64_t rows, int64_t cols,
                                              mx_parallel_for executor) {
  if (cols > kMaxKeys) return MX_UNSUPPORTED;
  if (!shape_ok(rows, cols) || !dropout_ok(dropout, seed)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    backward(at<T>(dy, 0), at<T>(probs, 0), at<T>(dscores, 0), scale, dropout, seed, rows, cols, executor);
  });
}
