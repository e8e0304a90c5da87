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

// ---- barriers and warp collectives -------------------------------------------------------------------------------------

namespace emulator {

// A lane outside the group of `width` is answered with its own value; one outside the mask is undefined, so NaN bytes.
template <class T>
T shuffle_xor(const char* file, int line, uint32_t mask, T value, int bits, int width = 32) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles carry 4 or 8 bytes");
  const int lane = lane_index(), from = lane ^ bits;
  uint64_t own = 0;
  memcpy(&own, &value, sizeof value);
  const uint64_t* brought = meet_lanes(mask, Collective::kShuffle, own, file, line);
  if (from / width > lane / width) return value;
  const uint64_t got = mask >> from & 1 ? brought[from] : ~uint64_t{0};
  memcpy(&value, &got, sizeof value);
  return value;
}

struct WarpBarrier {
  const char* file;
  int line;
  void operator()(uint32_t mask = 0xffffffffu) const { meet_lanes(mask, Collective::kSync, 0, file, line); }
};

}  // namespace emulator

#define __syncthreads() emulator::synchronize_block(__FILE__, __LINE__)
#define __syncwarp(...) (emulator::WarpBarrier{__FILE__, __LINE__}(__VA_ARGS__))
#define __shfl_xor_sync(...) emulator::shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)

// ---- arithmetic --------------------------------------------------------------------------------------------------------

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;
