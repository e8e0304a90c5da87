// exp, the logistic function and the normal distribution on eight floats, for the ranges in which the kernels use them.
//
// Polynomials are minimax fits (Lawson's weighted least squares, in double); errors as seen against double over the range:
// exp_to_zero 1 ulp, logistic 2 ulp of the value, normal_tail 3e-8 of 1.
#pragma once
#include "vector.h"

namespace mx::cpu {

// exp(x) for x <= 88: 2^n * exp(r), n = round(x / ln 2), r = x - n ln 2 in two steps, of which the first is exact. 0 below
// -87.3, where float32 has subnormals only; NaN stays NaN.
MX_INLINE Floats exp_to_zero(Floats x) {
  const Floats magic = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which is in the low bits
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = broadcast(0x1.6a1080p-10f);
  p = p * r + 0x1.1245c8p-7f;
  p = p * r + 0x1.55593cp-5f;
  p = p * r + 0x1.555482p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * (r * r) + r + 1.f;
  const Floats power = as_floats((as_words(shifted) << 23) + (127u << 23));
  return x < -87.3f ? Floats{} : p * power;
}

MX_INLINE Floats absolute(Floats v) { return as_floats(as_words(v) & 0x7fffffff); }

// 1 / (1 + exp(-z)) and 1 minus it, each without cancellation: exp sees no positive number.
struct Logistic {
  Floats value;
  Floats complement;
};
MX_INLINE Logistic logistic(Floats z) {
  const Floats e = exp_to_zero(-absolute(z));
  const Floats large = 1.f / (1.f + e), small = e * large;
  return {z < 0.f ? small : large, z < 0.f ? large : small};
}

// The standard normal distribution at v: cumulative(v) = P(X <= v), density(v) = exp(-v^2 / 2) / sqrt(2 pi). The tail
// P(X > a), a = |v|, is exp(-a^2 / 2) * t * P(t) with t = 1 / (1 + a / 4), P of degree 8.
struct Normal {
  Floats cumulative;
  Floats density;
};
MX_INLINE Normal normal(Floats v) {
  const Floats a = absolute(v);
  const Floats e = exp_to_zero(-0.5f * (a * a));
  const Floats t = 1.f / (1.f + 0.25f * a);
  Floats p = broadcast(0.03489663451910019f);
  p = p * t - 0.19910074770450592f;
  p = p * t + 0.3957245349884033f;
  p = p * t - 0.324813574552536f;
  p = p * t + 0.2879093289375305f;
  p = p * t - 0.0056101661175489426f;
  p = p * t + 0.11411262303590775f;
  p = p * t + 0.09698987007141113f;
  p = p * t + 0.09989150613546371f;
  const Floats tail = e * (t * p);
  return {v > 0.f ? 1.f - tail : tail, 0.39894228f * e};
}

}  // namespace mx::cpu
