// Second stage of every gradient that is a sum over rows: the sums of groups of rows, added in one order.
#pragma once
#include <stdint.h>

#include "../common/device.h"

namespace mx {

// results[s] [cols] = sums over p of workspace [sums][partitions][cols], in `dtype`; a null result is left out.
int sum_columns(const float* workspace, void* const (&results)[3], int sums, int dtype, int64_t partitions, int64_t cols,
                cudaStream_t stream);

}  // namespace mx
