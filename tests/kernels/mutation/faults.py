"""The faults of the CUDA kernels, and of what they share with the CPU's."""

from tests.kernels.mutation.fault import Fault

DEVICE, PHILOX = "common/device.h", "common/philox.h"
FORWARD, BACKWARD = "cuda/layer_norm_forward.cuh", "cuda/layer_norm_backward.cuh"
SOFTMAX, ROWS, LOOP = "cuda/softmax.cuh", "cuda/softmax_rows.cuh", "cuda/softmax_loop.cuh"
TILE, GELU = "cuda/bias_tile.cuh", "cuda/bias_gelu.cuh"
DROPOUT, ENTROPY, ADAM = "cuda/bias_dropout_add.cuh", "cuda/cross_entropy.cuh", "cuda/adam_variance.cuh"
SUMS = "cuda/column_sums.cu"
NORM, SOFT = ("layer_norm",), ("softmax",)
BIAS_GELU, BIAS_DROPOUT = ("bias_gelu",), ("bias_dropout_add",)

SHARED_CODE = (
    Fault("reduction without its barrier", DEVICE, "  __syncthreads();\n  const int warps", "  const int warps", NORM),
    Fault("shuffles stop at 2", DEVICE, "offset > 0; offset >>= 1", "offset > 1; offset >>= 1", NORM),
    Fault("reduction reads one warp too many", DEVICE, "warp < warps; ++warp)", "warp <= warps; ++warp)", NORM),
    Fault("Philox with another multiplier", PHILOX, "0xD2511F53u", "0xD2511F57u", BIAS_DROPOUT),
    Fault("Philox with nine rounds", PHILOX, "round < 10", "round < 9", BIAS_DROPOUT),
    Fault("words of noise in another order", PHILOX, "= noise.word[k] >=", "= noise.word[3 - k] >=", BIAS_DROPOUT),
    Fault("half of the element's noise", PHILOX, "seed, element >> 2)", "seed, element >> 3)", BIAS_DROPOUT),
    Fault(
        "column sums without a barrier",
        SUMS,
        "partial[threadIdx.y][threadIdx.x] = sum;\n  __syncthreads();",
        "partial[threadIdx.y][threadIdx.x] = sum;",
        NORM,
    ),
    Fault("column sums of a partition too many", SUMS, "p < partitions;", "p <= partitions;", NORM),
    Fault(
        "tile's sums without a barrier",
        TILE,
        "  __syncthreads();\n  const int64_t first",
        "  const int64_t first",
        BIAS_GELU,
    ),
    Fault("tile's sums beyond the columns", TILE, "    if (first + c >= cols) continue;\n", "", BIAS_GELU),
    Fault(
        "blocks write one place", TILE, "workspace[blockIdx.y * cols + first + c]", "workspace[first + c]", BIAS_GELU
    ),
)

LAYER_NORM = (
    Fault(
        "mean of the deviations left out",
        FORWARD,
        "  const float shift = sums[0]",
        "  const float shift = 0.f * sums[0]",
        NORM,
    ),
    Fault("no epsilon", FORWARD, "(fmaxf(variance, 0.f) + eps)", "(fmaxf(variance, 0.f) + 0.f * eps)", NORM),
    Fault(
        "reads a vector behind the row",
        FORWARD,
        "if (!live || column >= cols) continue;",
        "if (!live || column > cols) continue;",
        NORM,
    ),
    Fault(
        "sums in 16 bits",
        FORWARD,
        "for (int k = 0; k < N; ++k) total[0] += value[v][k];",
        "for (int k = 0; k < N; ++k) total[0] = to_float(from_float<T>(total[0] + value[v][k]));",
        NORM,
    ),
    Fault(
        "threads leave before a barrier",
        FORWARD,
        "for (int k = 0; k < N; ++k) total[0] += value[v][k];\n  }\n",
        "for (int k = 0; k < N; ++k) total[0] += value[v][k];\n  }\n  if (!live) return;\n",
        NORM,
    ),
    Fault(
        "next row uses this row's scratch",
        BACKWARD,
        "    parity ^= 1;\n    const float average = sums[0] * inverse",
        "    const float average = sums[0] * inverse",
        NORM,
    ),
    Fault(
        "gradient of the weight times the weight",
        BACKWARD,
        "        dy[k] *= x[k];\n",
        "        dy[k] = g * x[k];\n",
        NORM,
    ),
    Fault(
        "column sums read before they are written",
        BACKWARD,
        "if (SHARED || groups == 1) continue;\n      __syncthreads();",
        "if (SHARED || groups == 1) continue;",
        NORM,
    ),
    Fault(
        "column sums overwritten while they are read",
        BACKWARD,
        "        to[column] = sum;\n      }\n      __syncthreads();",
        "        to[column] = sum;\n      }",
        NORM,
    ),
    Fault("vectors where rows are not aligned", BACKWARD, "a.cols % kVector<T> == 0 &&", "a.cols % 2 == 0 &&", NORM),
    Fault(
        "the wrong row is fetched ahead",
        BACKWARD,
        "if constexpr (AHEAD) read_pair<SHARED>(a, row + step, next);",
        "if constexpr (AHEAD) read_pair<SHARED>(a, row, next);",
        NORM,
    ),
    Fault(
        "gradient of the sum left out",
        BACKWARD,
        "if (ADD && a.dsum) {",
        "if (ADD && a.dsum && a.cols < 0) {",
        ("add_layer_norm",),
    ),
)

ATTENTION = (
    Fault(
        "no guard of the last rows",
        SOFTMAX,
        "scratch + kMaxWarps);\n  if (row >= shape.rows) return;\n",
        "scratch + kMaxWarps);\n",
        SOFT,
    ),
    Fault(
        "scores beyond the diagonal count",
        SOFTMAX,
        "value[v][k] = column + k < length ? value[v][k] * scale : -INFINITY;",
        "value[v][k] = value[v][k] * scale;",
        SOFT,
    ),
    Fault(
        "scratch used twice without a barrier",
        SOFTMAX,
        "reduce_row<Sum>(total, scratch + kMaxWarps);",
        "reduce_row<Sum>(total, scratch);",
        SOFT,
    ),
    Fault(
        "shuffles in a branch that lanes part at",
        SOFTMAX,
        "  reduce_row<Max>(top, scratch);",
        "  if (length > 0) reduce_row<Max>(top, scratch);",
        SOFT,
    ),
    Fault(
        "backward pass without the noise",
        SOFTMAX,
        "if (dropout.threshold) apply_dropout<N>(dropout, seed, start + column, g[v]);",
        "",
        SOFT,
    ),
    Fault("rows of the first matrix", ROWS, "static_cast<uint32_t>(row) % sq", "static_cast<uint32_t>(row)", SOFT),
    Fault(
        "long rows: noise forgotten going back",
        LOOP,
        "if (dropout.threshold) apply_dropout<1>(dropout, seed, start + column, g);\n    product",
        "product",
        SOFT,
    ),
    Fault(
        "long rows: the sum of every column",
        LOOP,
        "  for (int column = static_cast<int>(threadIdx.x); column < length; column += lanes) {\n    float p[1]",
        "  for (int column = static_cast<int>(threadIdx.x); column < shape.sk; column += lanes) {\n    float p[1]",
        SOFT,
    ),
    Fault(
        "long rows: scratch used twice without a barrier",
        LOOP,
        "reduce_row<Sum>(total, scratch + kMaxWarps);",
        "reduce_row<Sum>(total, scratch);",
        SOFT,
    ),
    Fault("maximum left out", SOFTMAX, "__expf(value[v][k] - top[0])", "__expf(value[v][k])", SOFT),
)

OTHERS = (
    Fault("infinity times zero far out", GELU, "  if (fabsf(z) > 64.f) return s.value;\n", "", BIAS_GELU),
    Fault("another cubic term", GELU, "kCubic = 0.044715f", "kCubic = 0.04471f", BIAS_GELU),
    Fault(
        "noise by column",
        DROPOUT,
        "      if (dropout.threshold) apply_dropout<N>(dropout, seed, to, value);",
        "      if (dropout.threshold) apply_dropout<N>(dropout, seed, at.column, value);",
        BIAS_DROPOUT,
    ),
    Fault(
        "warps' maxima read before they are written",
        ENTROPY,
        "partial[thread / 32] = online;\n  __syncthreads();",
        "partial[thread / 32] = online;",
        ("cross_entropy",),
    ),
    Fault(
        "vectors from the middle of one",
        ENTROPY,
        "offset == 0 ? 0 : kVector<T> - offset;",
        "offset == 0 ? 0 : 0;",
        ("cross_entropy",),
    ),
    Fault("gradient in the padding", ENTROPY, "    if (column >= real) return 0.f;\n", "", ("cross_entropy",)),
    Fault(
        "minus infinity minus itself",
        ENTROPY,
        "return value == -INFINITY ? 0.f : __expf",
        "return __expf",
        ("cross_entropy",),
    ),
    Fault(
        "label of another slice",
        ENTROPY,
        "  const int64_t label = labels[blockIdx.x] - first;",
        "  const int64_t label = labels[blockIdx.x];",
        ("cross_entropy",),
    ),
    Fault("maximum drops a NaN", ADAM, "a > b || a != a ? a : b", "a > b ? a : b", ("adam_variance",)),
    Fault("an element behind the last", ADAM, "if (tail < count)", "if (tail <= count)", ("adam_variance",)),
)

CUDA_FAULTS = SHARED_CODE + LAYER_NORM + ATTENTION + OTHERS
