// CUDA's language and the device functions that kernels use, for g++ (`g++ -x c++ -include cuda_emulator.h kernel.cu`).
// Kernels run on the machine of machine.h.
//
// threadIdx and the like are macros for what the running fiber has; collectives carry their place in the source, which is
// how divergent ones are told apart (a return address is not: g++ copies a call into two branches).
#pragma once
#include <math.h>
#include <stdint.h>

#include <algorithm>

#include "machine.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

#define MX_SHARED(T, name, dims)   \
  typedef T name##_type dims;      \
  static const char name##_key = 0; \
  name##_type& name = *static_cast<name##_type*>(emulator::shared_variable(&name##_key, sizeof(name##_type), 16))
#define MX_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared())
#define MX_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
#define MX_LAST_ERROR() emulator::take_last_error()

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}

static constexpr int warpSize = 32;

// ---- barriers and warp collectives -------------------------------------------------------------------------------------

namespace emulator {

// Where a lane of a group of `width` lanes reads from, and whether that is inside the group.
struct Source {
  int lane;
  bool inside;
};

inline Source same_group(int lane, int from, int width) {
  return {from, from >= 0 && from / width == lane / width};
}

// A lane outside the group is answered with the caller's own value; one outside the mask is undefined, so NaN bytes.
template <class T>
T shuffle(uint32_t mask, T value, Source source, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles carry 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const uint64_t* brought = meet_lanes(mask, Collective::kShuffle, bits, file, line);
  if (!source.inside) return value;
  const uint64_t got = mask >> source.lane & 1 ? brought[source.lane] : ~uint64_t{0};
  memcpy(&value, &got, sizeof value);
  return value;
}

template <class T>
T shuffle_index(const char* file, int line, uint32_t mask, T value, int from, int width = 32) {
  const int first = lane_index() & ~(width - 1);
  return shuffle(mask, value, {first + (from & (width - 1)), true}, file, line);
}

template <class T>
T shuffle_xor(const char* file, int line, uint32_t mask, T value, int bits, int width = 32) {
  const int lane = lane_index(), from = lane ^ bits;
  return shuffle(mask, value, {from, from / width <= lane / width}, file, line);
}

template <class T>
T shuffle_down(const char* file, int line, uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = lane_index();
  return shuffle(mask, value, same_group(lane, lane + static_cast<int>(delta), width), file, line);
}

template <class T>
T shuffle_up(const char* file, int line, uint32_t mask, T value, unsigned delta, int width = 32) {
  const int lane = lane_index();
  return shuffle(mask, value, same_group(lane, lane - static_cast<int>(delta), width), file, line);
}

inline uint32_t ballot(const char* file, int line, uint32_t mask, int predicate) {
  const uint64_t* brought = meet_lanes(mask, Collective::kVote, predicate != 0, file, line);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) votes |= static_cast<uint32_t>(brought[lane]) << lane;
  }
  return votes;
}

struct WarpBarrier {
  const char* file;
  int line;
  void operator()(uint32_t mask = 0xffffffffu) const { meet_lanes(mask, Collective::kSync, 0, file, line); }
};

// One after the other by nature: fibers are not interrupted. What shadow.h must not take for a plain access.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomically(T* at, F change) {
  const T old = *at;
  *at = change(old);
  return old;
}

}  // namespace emulator

#define __syncthreads() emulator::synchronize_block(__FILE__, __LINE__)
#define __syncwarp(...) (emulator::WarpBarrier{__FILE__, __LINE__}(__VA_ARGS__))
#define __shfl_sync(...) emulator::shuffle_index(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle_down(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle_up(__FILE__, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) emulator::ballot(__FILE__, __LINE__, mask, predicate)
#define __any_sync(mask, predicate) (emulator::ballot(__FILE__, __LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) (emulator::ballot(__FILE__, __LINE__, mask, predicate) == (mask))

// ---- memory ------------------------------------------------------------------------------------------------------------

// Blocks run one after the other and see what was written before: fences have nothing to do.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
T atomicAdd(T* at, T value) {
  return emulator::atomically(at, [value](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* at, T value) {
  return emulator::atomically(at, [value](T old) { return std::max(old, value); });
}
template <class T>
T atomicExch(T* at, T value) {
  return emulator::atomically(at, [value](T) { return value; });
}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  return emulator::atomically(at, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}

// ---- arithmetic --------------------------------------------------------------------------------------------------------

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __int_as_float(int bits) { return emulator_bit_cast<float>(bits); }
inline int __float_as_int(float value) { return emulator_bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return emulator_bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator_bit_cast<unsigned>(value); }
using std::max;
using std::min;
