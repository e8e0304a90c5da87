// Softmax of one row, forward and backward; causal_softmax.cpp says which columns a row has.
#pragma once
#include "elementary.h"
#include "noise.h"

namespace mx::cpu {

// As on a GPU, where longer rows do not fit in registers: what a model can have does not depend on where it is.
constexpr int64_t kMaxKeys = 16384;

// Scaled scores, rounded as those are of which the maximum is taken: else the largest may differ from itself.
template <class T, class Lanes>
MX_INLINE Floats scaled(const T* from, Lanes lanes, float scale) {
  return apart(load(from, lanes) * scale);
}

// A row's columns: the first `length` of `cols`. What lies beyond is written as 0 and does not count where it is read.
struct Columns {
  int64_t length;
  int64_t cols;
};

// Writes 0 behind the last vector that for_first_vectors visits.
template <class T>
MX_INLINE void clear_rest(T* row, const Columns& of) {
  const int64_t full = of.length / kLanes * kLanes;
  const int64_t begin = full == of.length ? full : (full + kLanes <= of.cols ? full + kLanes : of.length);
  if (begin < of.cols) std::memset(row + begin, 0, static_cast<size_t>(of.cols - begin) * sizeof(T));
}

// Rows of one vector, as at the shortest lengths, stay in registers, and nothing is set up for more: work(lanes) for those
// columns, and true; or false where there are more.
template <class Work>
MX_INLINE bool in_one_vector(const Columns& of, Work work) {
  if (of.length > kLanes) return false;
  if (of.length == kLanes) {
    work(Full{});
  } else if (of.cols >= kLanes) {
    work(Inside{of.length});
  } else {
    work(Part{of.length});
  }
  return true;
}

template <class T, class Score, class Lanes>
MX_INLINE void softmax_vector(T* probs, const Score& score, Lanes lanes) {
  const Floats nothing = broadcast(-std::numeric_limits<float>::infinity());
  const float shift = max_lanes(keep(score(0, lanes, 0.f), nothing, lanes));
  const Floats e = keep(exp_to_zero(score(0, lanes, shift)), Floats{}, lanes);
  store(probs, keep(e * (1.f / sum_lanes(e)), Floats{}, lanes), lanes);
}

// probs = exp(v - max v) / sum, where score(column, lanes, shift) gives scale * score - shift. exp is taken once and kept in
// probs where these are float32; with 16 bits it is taken twice, which costs less than another row of float32.
template <class T, class Score>
MX_INLINE void softmax_row(T* probs, const Columns& of, const Score& score) {
  if (in_one_vector(of, [&](auto lanes) { softmax_vector(probs, score, lanes); })) return clear_rest(probs, of);
  const Floats nothing = broadcast(-std::numeric_limits<float>::infinity());
  Maximum highest;
  for_first_vectors(of.length, of.cols, [&](int64_t c, auto lanes, int chain) {
    highest.chain[chain] = maximum(keep(score(c, lanes, 0.f), nothing, lanes), highest.chain[chain]);
  });
  const float shift = highest.total();
  Sum sum;
  for_first_vectors(of.length, of.cols, [&](int64_t c, auto lanes, int chain) {
    const Floats e = keep(exp_to_zero(score(c, lanes, shift)), Floats{}, lanes);
    if constexpr (sizeof(T) == sizeof(float)) store(probs + c, e, lanes);
    sum.chain[chain] += e;
  });
  const float inverse = 1.f / sum.total();
  for_first_vectors(of.length, of.cols, [&](int64_t c, auto lanes, int) {
    Floats e;
    if constexpr (sizeof(T) == sizeof(float)) {
      e = load(probs + c, lanes);
    } else {
      e = exp_to_zero(score(c, lanes, shift));
    }
    store(probs + c, keep(e * inverse, Floats{}, lanes), lanes);
  });
  clear_rest(probs, of);
}

// dropped = dropout(probs), of the row that begins at element `first`.
template <class T>
MX_INLINE void drop_row(const T* probs, T* dropped, const Columns& of, Noise& noise, int64_t first) {
  const auto one = [&](auto lanes) {
    const Floats factor = load(noise.factors(first, std::min(of.cols, kLanes)), lanes);
    store(dropped, keep(load(probs, lanes) * factor, Floats{}, lanes), lanes);
  };
  if (in_one_vector(of, one)) return clear_rest(dropped, of);
  for_dropped(noise, first, of.length, [&](int64_t c, auto lanes, Floats factor) {
    store(dropped + c, load(probs + c, lanes) * factor, lanes);
  });
  std::memset(dropped + of.length, 0, static_cast<size_t>(of.cols - of.length) * sizeof(T));
}

template <class T, class Lanes>
MX_INLINE void backward_vector(Floats d, const T* probs, T* dscores, float scale, Lanes lanes) {
  const Floats p = load(probs, lanes);
  const float total = sum_lanes(keep(d * p, Floats{}, lanes));
  store(dscores, keep(p * scale * (d - total), Floats{}, lanes), lanes);
}

// dscores = scale * probs * (dy - sum(dy * probs)). dscores may be dy.
template <class T>
MX_INLINE void softmax_backward_row(const T* dy, const T* probs, T* dscores, const Columns& of, float scale) {
  const auto one = [&](auto lanes) { backward_vector(load(dy, lanes), probs, dscores, scale, lanes); };
  if (in_one_vector(of, one)) return clear_rest(dscores, of);
  Sum sum;
  for_first_vectors(of.length, of.cols, [&](int64_t c, auto lanes, int chain) {
    sum.chain[chain] += keep(load(dy + c, lanes) * load(probs + c, lanes), Floats{}, lanes);
  });
  const float total = sum.total();
  for_first_vectors(of.length, of.cols, [&](int64_t c, auto lanes, int) {
    const Floats d = load(probs + c, lanes) * scale * (load(dy + c, lanes) - total);
    store(dscores + c, keep(d, Floats{}, lanes), lanes);
  });
  clear_rest(dscores, of);
}

// The same where dy is the gradient of dropout(probs). The noise is drawn again for the second pass over a row that is
// longer than Noise remembers. dropout'(dy) is the same number in both, so that a row with one probability of 1 has
// gradients of exactly 0.
template <class T>
MX_INLINE void dropped_backward_row(const T* dy, const T* probs, T* dscores, const Columns& of, float scale, Noise& noise,
                                    int64_t first) {
  const auto one = [&](auto lanes) {
    const Floats factor = load(noise.factors(first, std::min(of.cols, kLanes)), lanes);
    backward_vector(apart(load(dy, lanes) * factor), probs, dscores, scale, lanes);
  };
  if (in_one_vector(of, one)) return clear_rest(dscores, of);
  Floats sum = {};
  for_dropped(noise, first, of.length, [&](int64_t c, auto lanes, Floats factor) {
    sum += apart(load(dy + c, lanes) * factor) * load(probs + c, lanes);
  });
  const float total = sum_lanes(sum);
  for_dropped(noise, first, of.length, [&](int64_t c, auto lanes, Floats factor) {
    store(dscores + c, load(probs + c, lanes) * scale * (apart(load(dy + c, lanes) * factor) - total), lanes);
  });
  std::memset(dscores + of.length, 0, static_cast<size_t>(of.cols - of.length) * sizeof(T));
}

}  // namespace mx::cpu
