// What every kernel stands on: one text that nvcc compiles for the device and, for the tests, g++ for an emulated one
// (tests/kernels/emulator, whose cuda_emulator.h the compiler is told to include first).
//
// An emulator cannot redefine syntax, so kernels write MX_SHARED(float, name, [32]) for __shared__ float name[32],
// MX_DYNAMIC_SHARED(float, name) for extern __shared__ memory, and MX_LAUNCH(kernel, grid, block, shared bytes, stream,
// arguments...) for <<<>>>; MX_LAST_ERROR() is the cudaError_t of the launch before.
#pragma once
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "abi.h"
#include "philox.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MX_SHARED(T, name, dims) __shared__ T name dims
#define MX_DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* const name = reinterpret_cast<T*>(name##_raw)
#define MX_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define MX_LAST_ERROR() static_cast<int>(cudaGetLastError())
#elif !defined(MX_LAUNCH)
#error "compile with nvcc, or with -include cuda_emulator.h"
#endif

#define MX_DEVICE __device__ __forceinline__

namespace mx {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxWarps = 32;

// ---- conversions: every sum and every formula is in float32, rounded once when it is stored ---------------------------

MX_DEVICE float to_float(float value) { return value; }
MX_DEVICE float to_float(__half value) { return __half2float(value); }
MX_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
MX_DEVICE T from_float(float value);
template <>
MX_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
MX_DEVICE __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
MX_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <class To, class From>
MX_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- vectors -----------------------------------------------------------------------------------------------------------

// N neighbours that are read and written by one instruction, of 16 bytes at most. 16-bit values stay two to a word until
// they are used: as separate values, each would take a register.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static constexpr bool kPairs = sizeof(T) == 2 && N % 2 == 0;
  std::conditional_t<kPairs, uint32_t, T> word[kPairs ? N / 2 : N];

  MX_DEVICE float get(int k) const {
    if constexpr (kPairs) return to_float(bits_as<T>(static_cast<uint16_t>(k % 2 ? word[k / 2] >> 16 : word[k / 2])));
    else return to_float(word[k]);
  }

  MX_DEVICE void set(const float (&from)[N]) {
    if constexpr (kPairs) {
#pragma unroll
      for (int pair = 0; pair < N / 2; ++pair) {
        const uint32_t high = bits_as<uint16_t>(from_float<T>(from[2 * pair + 1]));
        word[pair] = high << 16 | bits_as<uint16_t>(from_float<T>(from[2 * pair]));
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) word[k] = from_float<T>(from[k]);
    }
  }
};

// Elements in 16 bytes: what one lane reads at once where the layout allows it.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
MX_DEVICE Pack<T, N> read(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
MX_DEVICE void unpack(const Pack<T, N>& pack, float (&to)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = pack.get(k);
}

template <class T, int N>
MX_DEVICE void load(const T* from, float (&to)[N]) {
  unpack(read<T, N>(from), to);
}

// Writes a pack to global memory. For 16 bytes nvcc is told the instruction: it takes the struct apart into four stores in
// some kernels and not in others. It may move other accesses over this one: no kernel reads what it has written so.
template <class T, int N>
MX_DEVICE void write(T* to, const Pack<T, N>& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(pack) == 16) {
    const uint4 bits = bits_as<uint4>(pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w));
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class T, int N>
MX_DEVICE void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
  pack.set(from);
  write(to, pack);
}

// Parameters of a layer, in the dtype of the activations or (wide) in float32. A branch on `wide` is the same for the
// whole grid and costs less than twice the number of kernels.
struct Weights {
  const void* data;
  int wide;
};

template <class T, int N>
MX_DEVICE void load_weights(const Weights& weights, int64_t column, float (&to)[N]) {
  if (sizeof(T) == sizeof(float) || !weights.wide) {
    load<T, N>(static_cast<const T*>(weights.data) + column, to);
    return;
  }
  constexpr int kPart = N < 4 ? N : 4;
  const float* from = static_cast<const float*>(weights.data) + column;
#pragma unroll
  for (int part = 0; part < N / kPart; ++part) {
    const Pack<float, kPart> pack = read<float, kPart>(from + part * kPart);
#pragma unroll
    for (int k = 0; k < kPart; ++k) to[part * kPart + k] = pack.word[k];
  }
}

// ---- dropout -----------------------------------------------------------------------------------------------------------

// Multiplies elements first .. first + N - 1 of a tensor by their dropout factors. With N > 1, first is a multiple of 4.
template <int N>
MX_DEVICE void apply_dropout(const Dropout& dropout, uint64_t seed, int64_t first, float (&value)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int part = 0; part < N / 4; ++part) {
      float factor[4];
      dropout_factors(dropout, seed, (static_cast<uint64_t>(first) >> 2) + part, factor);
#pragma unroll
      for (int k = 0; k < 4; ++k) value[part * 4 + k] *= factor[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) value[k] *= dropout_factor(dropout, seed, static_cast<uint64_t>(first + k));
  }
}

MX_DEVICE uint64_t read_seed(const Dropout& dropout, const int64_t* seed) {
  return dropout.threshold ? static_cast<uint64_t>(*seed) : 0;
}

// ---- reductions --------------------------------------------------------------------------------------------------------

struct Sum {
  static MX_DEVICE float of(float a, float b) { return a + b; }
};
struct Max {
  static MX_DEVICE float of(float a, float b) { return fmaxf(a, b); }
};

// Reduces K values over the lanes of a row: threadIdx.x of a block (lanes, rows), with lanes a power of two up to 32 or a
// multiple of 32, and whole warps in the block. Every thread of the block takes part and gets the result, which is
// combined in one order. `scratch` holds K * kMaxWarps floats that no thread touches between this call's barrier and the
// next one: two calls in a row need two.
template <class Op, int K>
MX_DEVICE void reduce_row(float (&value)[K], float* scratch) {
  const int lanes = static_cast<int>(blockDim.x);
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    if (offset >= lanes) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] = Op::of(value[k], __shfl_xor_sync(kFullWarp, value[k], offset));
  }
  if (lanes <= 32) return;
  const int thread = static_cast<int>(threadIdx.y) * lanes + static_cast<int>(threadIdx.x);
  if (thread % 32 == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) scratch[k * kMaxWarps + thread / 32] = value[k];
  }
  __syncthreads();
  const int warps = lanes / 32, first = static_cast<int>(threadIdx.y) * warps;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    value[k] = scratch[k * kMaxWarps + first];
    for (int warp = 1; warp < warps; ++warp) value[k] = Op::of(value[k], scratch[k * kMaxWarps + first + warp]);
  }
}

}  // namespace mx
