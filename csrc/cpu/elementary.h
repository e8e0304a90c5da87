// exp, the logistic function and GELU's parts of the normal distribution on eight floats, for the ranges in which the
// kernels use them.
//
// Polynomials are minimax fits (Lawson's weighted least squares, in double); errors as seen against double over the range:
// exp_to_zero 1 ulp, logistic 2 ulp of the value, normal_tail_times 1.1e-7, normal_slope 2.3e-7 (torch's: 2.5e-7).
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

// a * P(X > a) of the standard normal distribution, a >= 0: the eighth power of a polynomial, since exp(-a^2 / 2) is that of
// exp(-a^2 / 16), a gentle curve. 0 beyond 5.5, where it is 1e-7 and nothing beside a; NaN stays NaN.
MX_INLINE Floats normal_tail_times(Floats a) {
  Floats p = broadcast(-2.909724514665868e-07f);
  p = p * a + 7.405178166663973e-06f;
  p = p * a - 5.979984052828513e-05f;
  p = p * a + 3.281611861893907e-05f;
  p = p * a + 0.0015070642111822963f;
  p = p * a - 0.0006747542065568268f;
  p = p * a - 0.03192652389407158f;
  p = p * a - 0.09145781397819519f;
  p = p * a + 0.9170040488243103f;
  p *= p;
  p *= p;
  p *= p;
  return a > 5.5f ? Floats{} : a * p;
}

// d/dv (v * P(X <= v)) = P(X <= v) + v * density(v): 1/2 and an odd function, v times a rational one of v^2. 0 or 1 beyond 6.
MX_INLINE Floats normal_slope(Floats v) {
  const Floats u = v * v;
  Floats p = broadcast(-2.888036337855837e-11f), q = broadcast(3.636394296790968e-07f);
  p = p * u + 1.3003135457267945e-08f;
  p = p * u + 1.121945047088957e-06f;
  p = p * u + 3.2027157431002706e-05f;
  p = p * u + 0.00028522787033580244f;
  p = p * u + 0.013569002039730549f;
  p = p * u - 0.018037809059023857f;
  p = p * u + 0.7978845238685608f;
  q = q * u + 1.0812284926942084e-05f;
  q = q * u + 0.0002586070913821459f;
  q = q * u + 0.004150230437517166f;
  q = q * u + 0.04558289423584938f;
  q = q * u + 0.3107258081436157f;
  q = q * u + 1.f;
  const Floats slope = (v * p) / q + 0.5f;
  const Floats below = v < -6.f ? Floats{} : slope;
  return v > 6.f ? broadcast(1.f) : below;
}

}  // namespace mx::cpu
