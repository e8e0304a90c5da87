// Statistic of Adam's second moment: result[0] = sum of sqrt(v), result[1] = max of sqrt(v), one pass over v.
//
// Layout: v [count]. Threads have partitions, of bounds that depend on the count alone; each adds up to 4096 roots in float32
// lanes and the pieces in float64, to workspace [2][partitions], which one thread puts together. NaN in v shows in both.
#include <cmath>

#include "column_sums.h"

namespace mx::cpu {
namespace {

constexpr int64_t kPiece = 4096;

MX_INLINE Floats root(Floats v) {
#if defined(__AVX__)
  return _mm256_sqrt_ps(v);
#else
  for (int64_t k = 0; k < kLanes; ++k) v[k] = __builtin_sqrtf(v[k]);
  return v;
#endif
}

struct Statistic {
  double sum = 0;
  double highest = 0;

  void add(double more, double other) {
    sum += more;
    // Where the sum is NaN a root was, and no comparison has seen it.
    highest = std::isnan(sum) ? sum : std::max(highest, other);
  }
};

template <class T>
Statistic statistic(const T* v, int64_t count) {
  Statistic of;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    Sum sum;
    Maximum highest;
    for_vectors(std::min(kPiece, count - begin), [&](int64_t c, auto lanes, int chain) {
      const Floats r = root(load(v + begin + c, lanes));
      sum.chain[chain] += r;
      highest.chain[chain] = maximum(r, highest.chain[chain]);
    });
    of.add(static_cast<double>(sum.total()), static_cast<double>(highest.total()));
  }
  return of;
}

}  // namespace
}  // namespace mx::cpu

using namespace mx::cpu;

extern "C" int mx_cpu_adam_variance(int dtype, const void* v, double* result, double* workspace, int64_t partitions,
                                    int64_t count, mx_parallel_for executor) {
  if (count < 0 || !partitions_ok(partitions)) return MX_BAD_ARGUMENT;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t group = std::max<int64_t>(1, count / partitions);
    parallel(executor, partitions, row_grain(group, kCheapGrain), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * count / partitions, last = (p + 1) * count / partitions;
        const Statistic of = statistic(at<T>(v, first), last - first);
        workspace[p] = of.sum;
        workspace[partitions + p] = of.highest;
      }
    });
    Statistic all;
    for (int64_t p = 0; p < partitions; ++p) all.add(workspace[p], workspace[partitions + p]);
    result[0] = all.sum;
    result[1] = all.highest;
  });
}
