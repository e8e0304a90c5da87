// Vectors of eight floats, and how float32, float16 and bfloat16 memory becomes one and back.
//
// GCC's vector extensions: one text that is AVX2 or AVX-512 where the compiler is told so (-march=native), and pairs of
// SSE registers, or whatever the machine has, where it is not. The width is a constant, so the order in which numbers
// are added does not depend on the machine. What a compiler may not do with this code is -ffast-math.
#pragma once
#include <stdint.h>

#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "../common/abi.h"

// Vectors are only passed between functions that are inlined, so how they would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#define MX_INLINE inline __attribute__((always_inline))

namespace mx::cpu {

constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

// Elements as they lie in memory; arithmetic is on Floats alone.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

MX_INLINE Floats broadcast(float value) { return Floats{} + value; }
MX_INLINE Ints as_ints(Floats v) { return reinterpret_cast<Ints>(v); }
MX_INLINE Words as_words(Floats v) { return reinterpret_cast<Words>(v); }
MX_INLINE Floats as_floats(Words v) { return reinterpret_cast<Floats>(v); }

// The second operand where one is NaN.
MX_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
MX_INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

// A product that stays rounded where it is added to: the compiler may not make one operation of both.
MX_INLINE Floats apart(Floats product) {
#if defined(__AVX__)
  __asm__("" : "+x"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
}

// Asks for memory that is read soon: the next rows, while the last pass over the present ones is arithmetic in the first
// cache. It may lie behind the tensor.
MX_INLINE void prefetch(const void* place) { __builtin_prefetch(place); }

// ---- how much of a vector is meant -------------------------------------------------------------------------------------

struct Full {};
// `count` < 8 elements lie in memory that may be touched: the end of a row.
struct Part {
  int64_t count;
};
// `count` < 8 elements are meant, but eight lie in the row: what a causal mask leaves of it. All eight are written.
struct Inside {
  int64_t count;
};

MX_INLINE Ints first_lanes(int64_t count) {
  return Ints{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(count);
}

// v, and `other` in the lanes that are not meant.
MX_INLINE Floats keep(Floats v, Floats, Full) { return v; }
MX_INLINE Floats keep(Floats v, Floats other, Part lanes) { return first_lanes(lanes.count) ? v : other; }
MX_INLINE Floats keep(Floats v, Floats other, Inside lanes) { return first_lanes(lanes.count) ? v : other; }

// ---- float32 -----------------------------------------------------------------------------------------------------------

MX_INLINE Floats load(const float* from, Full) {
  Floats v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
MX_INLINE Floats load(const float* from, Inside) { return load(from, Full{}); }
MX_INLINE Floats load(const float* from, Part lanes) {
#if defined(__AVX2__)
  return _mm256_maskload_ps(from, reinterpret_cast<__m256i>(first_lanes(lanes.count)));
#else
  Floats v{};
  for (int64_t k = 0; k < lanes.count; ++k) v[k] = from[k];
  return v;
#endif
}

MX_INLINE void store(float* to, Floats v, Full) { std::memcpy(to, &v, sizeof(v)); }
MX_INLINE void store(float* to, Floats v, Inside) { std::memcpy(to, &v, sizeof(v)); }
MX_INLINE void store(float* to, Floats v, Part lanes) {
#if defined(__AVX2__)
  _mm256_maskstore_ps(to, reinterpret_cast<__m256i>(first_lanes(lanes.count)), v);
#else
  for (int64_t k = 0; k < lanes.count; ++k) to[k] = v[k];
#endif
}

// ---- sixteen bits ------------------------------------------------------------------------------------------------------

// Moves `count` < 8 elements in at most three pieces.
template <class T>
MX_INLINE void copy_part(T* to, const T* from, int64_t count) {
  int64_t done = 0;
  if (count & 4) std::memcpy(to, from, 4 * sizeof(T)), done = 4;
  if (count & 2) std::memcpy(to + done, from + done, 2 * sizeof(T)), done += 2;
  if (count & 1) std::memcpy(to + done, from + done, sizeof(T));
}

MX_INLINE Halves load_halves(const void* from, Full) {
  Halves v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
MX_INLINE Halves load_halves(const void* from, Inside) { return load_halves(from, Full{}); }
MX_INLINE Halves load_halves(const void* from, Part lanes) {
  uint16_t part[kLanes] = {};
  copy_part(part, static_cast<const uint16_t*>(from), lanes.count);
  return load_halves(part, Full{});
}

MX_INLINE void store_halves(void* to, Halves v, Full) { std::memcpy(to, &v, sizeof(v)); }
MX_INLINE void store_halves(void* to, Halves v, Inside) { std::memcpy(to, &v, sizeof(v)); }
MX_INLINE void store_halves(void* to, Halves v, Part lanes) {
  uint16_t part[kLanes];
  std::memcpy(part, &v, sizeof(v));
  copy_part(static_cast<uint16_t*>(to), part, lanes.count);
}

MX_INLINE Floats widen(Halves v, BFloat16) { return as_floats(__builtin_convertvector(v, Words) << 16); }

// To nearest, ties to even; NaN stays NaN, which the rounding could carry over to infinity.
MX_INLINE Halves narrow(Floats v, BFloat16) {
  const Words bits = as_words(v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, Halves);
}

#if defined(__F16C__)
MX_INLINE Floats widen(Halves v, Half) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v)); }
MX_INLINE Halves narrow(Floats v, Half) {
  return reinterpret_cast<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// Exponent and fraction move into place; the exponent's bias grows by 112, once more for infinity and NaN, and float16's
// subnormals are normalized by a subtraction (no float32 subnormal occurs, which a processor may treat as 0).
MX_INLINE Floats widen(Halves v, Half) {
  const Words bits = __builtin_convertvector(v, Words);
  const Words exponent = bits & 0x7c00, magnitude = ((bits & 0x7fff) << 13) + (112u << 23);
  const Words special = magnitude + (112u << 23);
  const Words subnormal = as_words(as_floats(magnitude + (1u << 23)) - broadcast(6.103515625e-05f));
  const Words value = exponent == 0x7c00 ? special : (exponent == 0 ? subnormal : magnitude);
  return as_floats(value | ((bits & 0x8000) << 16));
}

// Normal numbers round in integers, results below 2^-14 in an addition whose last place is float16's smallest step.
MX_INLINE Halves narrow(Floats v, Half) {
  const Words bits = as_words(v), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words subnormal = as_words(as_floats(magnitude) + broadcast(0.5f)) - (126u << 23);
  const Words large = magnitude > (255u << 23) ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words value = magnitude >= (143u << 23) ? large : (magnitude < (113u << 23) ? subnormal : normal);
  return __builtin_convertvector(value | sign, Halves);
}
#endif

template <class T, class Lanes>
MX_INLINE Floats load(const T* from, Lanes lanes) {
  return widen(load_halves(from, lanes), T{});
}

template <class T, class Lanes>
MX_INLINE void store(T* to, Floats v, Lanes lanes) {
  store_halves(to, narrow(v, T{}), lanes);
}

// v as it is when it has been stored as a T.
template <class T>
MX_INLINE Floats rounded(Floats v, T) {
  return widen(narrow(v, T{}), T{});
}
MX_INLINE Floats rounded(Floats v, float) { return v; }

// Parameters of a layer: in the dtype of the activations or (wide) in float32. Null parameters read as 0.
struct Weights {
  const void* data;
  bool wide;
};

template <class T, class Lanes>
MX_INLINE Floats load_weights(const Weights& weights, int64_t column, Lanes lanes) {
  if (!weights.data) return Floats{};
  if (sizeof(T) == sizeof(float) || weights.wide) return load(static_cast<const float*>(weights.data) + column, lanes);
  return load(static_cast<const T*>(weights.data) + column, lanes);
}

// ---- all lanes of a vector, and all vectors of a row -------------------------------------------------------------------

MX_INLINE float sum_lanes(Floats v) {
  v += __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3});
  v += __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5});
  v += __builtin_shuffle(v, Ints{1, 0, 3, 2, 5, 4, 7, 6});
  return v[0];
}

MX_INLINE float max_lanes(Floats v) {
  v = maximum(v, __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3}));
  v = maximum(v, __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5}));
  v = maximum(v, __builtin_shuffle(v, Ints{1, 0, 3, 2, 5, 4, 7, 6}));
  return v[0];
}

// Independent accumulators, so that an addition does not wait for the one before.
constexpr int kChains = 4;

// body(column, lanes, chain) for every vector of a row of `cols` elements.
template <class Body>
MX_INLINE void for_vectors(int64_t cols, Body body) {
  int64_t c = 0;
  for (; c + kChains * kLanes <= cols; c += kChains * kLanes) {
    body(c, Full{}, 0);
    body(c + kLanes, Full{}, 1);
    body(c + 2 * kLanes, Full{}, 2);
    body(c + 3 * kLanes, Full{}, 3);
  }
  for (; c + kLanes <= cols; c += kLanes) body(c, Full{}, 0);
  if (c < cols) body(c, Part{cols - c}, 1);
}

// The same over the first `length` columns of a row of `cols`.
template <class Body>
MX_INLINE void for_first_vectors(int64_t length, int64_t cols, Body body) {
  const int64_t full = length / kLanes * kLanes;
  for_vectors(full, body);
  if (full == length) return;
  if (full + kLanes <= cols) return body(full, Inside{length - full}, 1);
  body(full, Part{length - full}, 1);
}

// What for_vectors gathered, added or compared in one order.
struct Sum {
  Floats chain[kChains] = {};
  MX_INLINE float total() const { return sum_lanes((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

// The sum of value(column, lanes) over a row: of pieces first, so that few additions follow one another.
template <class Value>
MX_INLINE float sum_row(int64_t cols, Value value) {
  constexpr int64_t piece = 16 * kChains * kLanes;
  Sum all;
  for (int64_t begin = 0; begin < cols; begin += piece) {
    Sum part;
    for_vectors(cols - begin < piece ? cols - begin : piece,
                [&](int64_t c, auto lanes, int chain) { part.chain[chain] += value(begin + c, lanes); });
    for (int chain = 0; chain < kChains; ++chain) all.chain[chain] += part.chain[chain];
  }
  return all.total();
}

struct Maximum {
  Floats chain[kChains];
  MX_INLINE Maximum() {
    for (Floats& each : chain) each = broadcast(-std::numeric_limits<float>::infinity());
  }
  MX_INLINE float total() const { return max_lanes(maximum(maximum(chain[0], chain[1]), maximum(chain[2], chain[3]))); }
};

}  // namespace mx::cpu
