// CUDA's types that kernels use, for g++: names, layout and alignment are nvcc's, so a kernel has the same mangled name
// under both compilers. 16-bit floats have conversions and no arithmetic: kernels compute in float32.
#pragma once
#include <stdint.h>
#include <string.h>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To emulator_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Both round to nearest, ties to even, and make NaN the one that the device makes.
inline float __half2float(__half value) { return static_cast<float>(emulator_bit_cast<_Float16>(value.bits)); }
inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  return {emulator_bit_cast<uint16_t>(static_cast<_Float16>(value))};
}
inline float __bfloat162float(__nv_bfloat16 value) {
  return emulator_bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  const uint32_t bits = emulator_bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
