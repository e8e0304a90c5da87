// Sums over the rows of a matrix, for gradients of parameters: partial sums of groups of rows, then of groups.
//
// Group p of P has rows [p * rows / P, (p + 1) * rows / P): bounds that depend on the shape alone. A group's sums stay in
// the first or second cache, in its lines of the workspace [kinds][P][cols], while its rows go by. With about as many
// groups as rows in each, no sum has more than 2 * sqrt(rows) terms after another, which is what keeps it accurate.
#pragma once
#include <array>

#include "parallel.h"

namespace mx::cpu {

constexpr int64_t kMaxPartitions = 512;

inline bool partitions_ok(int64_t partitions) { return partitions > 0; }

template <int KINDS>
struct ColumnSums {
  float* workspace;
  int64_t partitions;
  int64_t rows;
  int64_t cols;

  float* of(int kind, int64_t partition) const { return workspace + (kind * partitions + partition) * cols; }
  int64_t first_row(int64_t partition) const { return partition * rows / partitions; }

  // work(first row, last row + 1, sums of each kind, zero at first) for every group.
  template <class Work>
  void gather(mx_parallel_for executor, int64_t elements_per_task, const Work& work) const {
    const int64_t group = std::max<int64_t>(1, rows / partitions) * cols;
    parallel(executor, partitions, row_grain(group, elements_per_task), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        std::array<float*, KINDS> sums;
        for (int kind = 0; kind < KINDS; ++kind) {
          // Without a workspace nobody asks for sums.
          float* const sum = workspace ? of(kind, p) : nullptr;
          if (sum) std::memset(sum, 0, static_cast<size_t>(cols) * sizeof(float));
          sums[static_cast<size_t>(kind)] = sum;
        }
        work(first_row(p), first_row(p + 1), sums);
      }
    });
  }

  // Adds the groups' sums of one kind into result [cols] of type T or (wide) float; null: nobody wants them.
  template <class T>
  void finish(mx_parallel_for executor, int kind, void* result, bool wide) const {
    if (!result) return;
    constexpr int64_t stride = kChains * kLanes;
    const auto columns = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * stride; c < std::min(cols, end * stride); c += stride) {
        Floats sums[kChains] = {};
        const int64_t count = std::min(stride, cols - c);
        for (int64_t p = 0; p < partitions; ++p)
          for_chains(count, [&](int64_t k, auto lanes, int chain) { sums[chain] += load(of(kind, p) + c + k, lanes); });
        for_chains(count, [&](int64_t k, auto lanes, int chain) {
          if (wide || sizeof(T) == sizeof(float)) return store(static_cast<float*>(result) + c + k, sums[chain], lanes);
          store(static_cast<T*>(result) + c + k, sums[chain], lanes);
        });
      }
    };
    parallel(executor, (cols + stride - 1) / stride, row_grain(stride * partitions, kCheapGrain), columns);
  }

 private:
  // body(column, lanes, number of the vector) for at most kChains vectors.
  template <class Body>
  static MX_INLINE void for_chains(int64_t count, Body body) {
    if (count == kChains * kLanes) {
      for (int chain = 0; chain < kChains; ++chain) body(chain * kLanes, Full{}, chain);
      return;
    }
    int chain = 0;
    for (; (chain + 1) * kLanes <= count; ++chain) body(chain * kLanes, Full{}, chain);
    if (chain * kLanes < count) body(chain * kLanes, Part{count - chain * kLanes}, chain);
  }
};

}  // namespace mx::cpu
