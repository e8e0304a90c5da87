// What every op does before its arithmetic: checks, the element type from its number, and work split over threads.
//
// Work is split over rows, or over partitions of rows whose bounds depend on the shape alone, never over the columns of
// one sum: the executor may cut it anywhere and the results are the same.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../common/philox.h"
#include "vector.h"

namespace mx::cpu {

// Elements that are worth a thread of their own (some 20 us): where one costs a few instructions, and where it has an exp
// or a word of noise.
constexpr int64_t kCheapGrain = 32768;
constexpr int64_t kDearGrain = 8192;

inline int64_t row_grain(int64_t cols, int64_t elements) { return std::max<int64_t>(1, elements / std::max<int64_t>(1, cols)); }

// work(begin, end) over pieces of [0, count).
template <class Work>
void parallel(mx_parallel_for executor, int64_t count, int64_t grain, const Work& work) {
  if (count <= 0) return;
  if (!executor || count <= grain) return work(0, count);
  const auto body = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Work*>(context))(begin, end); };
  executor(0, count, grain, body, const_cast<Work*>(std::addressof(work)));
}

// f(a value of the element type), or MX_BAD_ARGUMENT.
template <class F>
int by_dtype(int dtype, const F& f) {
  switch (dtype) {
    case MX_FLOAT32: f(float()); return MX_OK;
    case MX_FLOAT16: f(Half()); return MX_OK;
    case MX_BFLOAT16: f(BFloat16()); return MX_OK;
    default: return MX_BAD_ARGUMENT;
  }
}

inline bool weight_dtype_ok(int dtype, int weight_dtype) { return weight_dtype == dtype || weight_dtype == MX_FLOAT32; }
inline Weights weights_of(const void* data, int weight_dtype) { return {data, weight_dtype == MX_FLOAT32}; }
inline bool shape_ok(int64_t rows, int64_t cols) { return rows >= 0 && cols > 0; }

inline bool dropout_ok(float probability, const int64_t* seed) {
  return probability >= 0.f && probability < 1.f && (probability == 0.f || seed);
}

template <class T>
T* at(void* base, int64_t element) {
  return base ? static_cast<T*>(base) + element : nullptr;
}
template <class T>
const T* at(const void* base, int64_t element) {
  return base ? static_cast<const T*>(base) + element : nullptr;
}

}  // namespace mx::cpu
