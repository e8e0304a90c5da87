// Host side of every op: from an element type's number to the type, and from a shape to a grid.
#pragma once
#include <stdint.h>

#include "../common/device.h"

namespace mx {

// Columns up to which a row is kept in registers: 512 threads of 32 elements.
constexpr int64_t kMaxRegisterColumns = 16384;
constexpr int64_t kMaxGrid = 2147483647;
// A row of one warp shares its block with others, so that a block is enough work to be started for.
constexpr int kRowBlock = 128;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// True where 16-byte loads may be used; a null pointer is not read.
template <class... Pointer>
bool aligned(Pointer... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

// f(a value of the element type), or MX_BAD_ARGUMENT.
template <class F>
int by_dtype(int dtype, F f) {
  switch (dtype) {
    case MX_FLOAT32: return f(float());
    case MX_FLOAT16: return f(__half());
    case MX_BFLOAT16: return f(__nv_bfloat16());
    default: return MX_BAD_ARGUMENT;
  }
}

inline bool weight_dtype_ok(int dtype, int weight_dtype) {
  return weight_dtype == dtype || weight_dtype == MX_FLOAT32;
}

inline Weights weights_of(const void* data, int weight_dtype) { return {data, weight_dtype == MX_FLOAT32 ? 1 : 0}; }

inline bool dropout_ok(float probability, const int64_t* seed) {
  return probability >= 0.f && probability < 1.f && (probability == 0.f || seed != nullptr);
}

inline bool columns_ok(int64_t cols) { return cols > 0 && cols < kMaxGrid; }
inline bool partitions_ok(int64_t partitions) { return partitions > 0 && partitions < kMaxGrid; }

// Lets a kernel have more dynamic shared memory than the 48 KB every device gives; false where this device has less.
template <class Kernel>
bool allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return true;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) == cudaSuccess)
    return true;
  MX_LAST_ERROR();  // the refusal is handled here, and is not to be found by whoever asks next
  return false;
}

// Threads of a block, (lanes, rows): a row has a power of two of lanes up to a warp, or whole warps.
struct RowShape {
  int lanes;
  int rows;
};

// As few lanes as hold `cols` columns at `per_lane` each; as many rows as make `threads`, at least one.
inline RowShape row_shape(int64_t cols, int per_lane, int threads) {
  const int needed = static_cast<int>(ceil_div(cols, per_lane));
  int lanes = 1;
  if (needed > 32) lanes = (needed + 31) / 32 * 32;
  while (needed <= 32 && lanes < needed) lanes *= 2;
  return {lanes, lanes < threads ? threads / lanes : 1};
}

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace mx
