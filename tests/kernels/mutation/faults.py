"""The faults that are planted: a text of a source, and what stands in its place."""

import shutil
from dataclasses import dataclass
from pathlib import Path

# Sources whose functions the tests of an op call beside its own.
NEEDED: dict[str, tuple[str, ...]] = {"add_layer_norm": ("layer_norm",)}


@dataclass(frozen=True)
class Fault:
    """``file`` is below csrc; ``old`` is in it once. ``ops`` have the tests (tests/kernels/test_OP.py) to notice it."""

    name: str
    file: str
    ops: tuple[str, ...]
    old: str
    new: str

    @property
    def on_cpu(self) -> bool:
        return self.file.startswith("cpu/")

    def occurrences(self, root: Path) -> int:
        """How often the text is in the sources: anything but 1 is a fault of this list."""
        return (root / self.file).read_text(encoding="utf-8").count(self.old)

    def plant(self, root: Path, target: Path) -> None:
        """Copies the sources of the ops to ``target``, with the fault; other kernels are left out, to build less."""
        shutil.copytree(root, target)
        path = target / self.file
        text = path.read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.name}: not once in {self.file}"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        if not self.on_cpu:
            kept = {f"{source}.cu" for op in self.ops for source in (op, *NEEDED.get(op, ()))} | {"column_sums.cu"}
            for source in (target / "cuda").glob("*.cu"):
                if source.name not in kept:
                    source.unlink()


DEVICE, PHILOX = "common/device.h", "common/philox.h"
FORWARD, BACKWARD = "cuda/layer_norm_forward.cuh", "cuda/layer_norm_backward.cuh"
SOFTMAX, ROWS, LOOP = "cuda/softmax.cuh", "cuda/softmax_rows.cuh", "cuda/softmax_loop.cuh"
TILE, GELU = "cuda/bias_tile.cuh", "cuda/bias_gelu.cuh"
DROPOUT, ENTROPY, ADAM = "cuda/bias_dropout_add.cuh", "cuda/cross_entropy.cuh", "cuda/adam_variance.cuh"
SUMS = "cuda/column_sums.cu"
NORM, SOFT = ("layer_norm",), ("softmax",)
BIAS_GELU, BIAS_DROPOUT = ("bias_gelu",), ("bias_dropout_add",)
LOSS, VARIANCE, ADD_NORM = ("cross_entropy",), ("adam_variance",), ("add_layer_norm",)

# fmt: off
FAULTS = (
    # ---- what all kernels share
    Fault("reduction without its barrier", DEVICE, NORM, "  __syncthreads();\n  const int warps", "  const int warps"),
    Fault("shuffles stop at 2", DEVICE, NORM, "offset > 0; offset >>= 1", "offset > 1; offset >>= 1"),
    Fault("reduction reads one warp too many", DEVICE, NORM, "warp < warps; ++warp)", "warp <= warps; ++warp)"),
    Fault("Philox with another multiplier", PHILOX, BIAS_DROPOUT, "0xD2511F53u", "0xD2511F57u"),
    Fault("Philox with nine rounds", PHILOX, BIAS_DROPOUT, "round < 10", "round < 9"),
    Fault("words of noise in another order", PHILOX, BIAS_DROPOUT, "= noise.word[k] >=", "= noise.word[3 - k] >="),
    Fault("half of the element's noise", PHILOX, BIAS_DROPOUT, "seed, element >> 2)", "seed, element >> 3)"),
    Fault("column sums without a barrier", SUMS, NORM,
          "partial[threadIdx.y][threadIdx.x] = sum;\n  __syncthreads();", "partial[threadIdx.y][threadIdx.x] = sum;"),
    Fault("column sums of a partition too many", SUMS, NORM, "p < partitions;", "p <= partitions;"),
    Fault("tile's sums without a barrier", TILE, BIAS_GELU,
          "  __syncthreads();\n  const int64_t first", "  const int64_t first"),
    Fault("tile's sums beyond the columns", TILE, BIAS_GELU, "    if (first + c >= cols) continue;\n", ""),
    Fault("blocks write one place", TILE, BIAS_GELU,
          "workspace[blockIdx.y * cols + first + c]", "workspace[first + c]"),
    # ---- LayerNorm
    Fault("mean of the deviations left out", FORWARD, NORM,
          "  const float shift = sums[0]", "  const float shift = 0.f * sums[0]"),
    Fault("no epsilon", FORWARD, NORM, "(fmaxf(variance, 0.f) + eps)", "(fmaxf(variance, 0.f) + 0.f * eps)"),
    Fault("reads a vector behind the row", FORWARD, NORM,
          "if (!live || column >= cols) continue;", "if (!live || column > cols) continue;"),
    Fault("sums in 16 bits", FORWARD, NORM,
          "for (int k = 0; k < N; ++k) total[0] += value[v][k];",
          "for (int k = 0; k < N; ++k) total[0] = to_float(from_float<T>(total[0] + value[v][k]));"),
    Fault("threads leave before a barrier", FORWARD, NORM,
          "for (int k = 0; k < N; ++k) total[0] += value[v][k];\n  }\n",
          "for (int k = 0; k < N; ++k) total[0] += value[v][k];\n  }\n  if (!live) return;\n"),
    Fault("next row uses this row's scratch", BACKWARD, NORM,
          "    parity ^= 1;\n    const float average = sums[0] * inverse",
          "    const float average = sums[0] * inverse"),
    Fault("gradient of the weight times the weight", BACKWARD, NORM,
          "        dy[k] *= x[k];\n", "        dy[k] = g * x[k];\n"),
    Fault("column sums read before they are written", BACKWARD, NORM,
          "if (SHARED || groups == 1) continue;\n      __syncthreads();", "if (SHARED || groups == 1) continue;"),
    Fault("column sums overwritten while they are read", BACKWARD, NORM,
          "        to[column] = sum;\n      }\n      __syncthreads();", "        to[column] = sum;\n      }"),
    Fault("vectors where rows are not aligned", BACKWARD, NORM, "a.cols % kVector<T> == 0 &&", "a.cols % 2 == 0 &&"),
    Fault("the wrong row is fetched ahead", BACKWARD, NORM,
          "if constexpr (AHEAD) read_pair<SHARED>(a, row + step, next);",
          "if constexpr (AHEAD) read_pair<SHARED>(a, row, next);"),
    Fault("gradient of the sum left out", BACKWARD, ADD_NORM,
          "if (ADD && a.dsum) {", "if (ADD && a.dsum && a.cols < 0) {"),
    # ---- attention
    Fault("no guard of the last rows", SOFTMAX, SOFT,
          "scratch + kMaxWarps);\n  if (row >= shape.rows) return;\n", "scratch + kMaxWarps);\n"),
    Fault("scores beyond the diagonal count", SOFTMAX, SOFT,
          "value[v][k] = column + k < length ? value[v][k] * scale : -INFINITY;", "value[v][k] = value[v][k] * scale;"),
    Fault("scratch used twice without a barrier", SOFTMAX, SOFT,
          "reduce_row<Sum>(total, scratch + kMaxWarps);", "reduce_row<Sum>(total, scratch);"),
    Fault("shuffles in a branch that lanes part at", SOFTMAX, SOFT,
          "  reduce_row<Max>(top, scratch);", "  if (length > 0) reduce_row<Max>(top, scratch);"),
    Fault("backward pass without the noise", SOFTMAX, SOFT,
          "if (dropout.threshold) apply_dropout<N>(dropout, seed, start + column, g[v]);", ""),
    Fault("rows of the first matrix", ROWS, SOFT, "static_cast<uint32_t>(row) % sq", "static_cast<uint32_t>(row)"),
    Fault("long rows: noise forgotten going back", LOOP, SOFT,
          "if (dropout.threshold) apply_dropout<1>(dropout, seed, start + column, g);\n    product", "product"),
    Fault("long rows: the sum of every column", LOOP, SOFT,
          "  for (int column = static_cast<int>(threadIdx.x); column < length; column += lanes) {\n    float p[1]",
          "  for (int column = static_cast<int>(threadIdx.x); column < shape.sk; column += lanes) {\n    float p[1]"),
    Fault("long rows: scratch used twice without a barrier", LOOP, SOFT,
          "reduce_row<Sum>(total, scratch + kMaxWarps);", "reduce_row<Sum>(total, scratch);"),
    Fault("maximum left out", SOFTMAX, SOFT, "__expf(value[v][k] - top[0])", "__expf(value[v][k])"),
    # ---- the others
    Fault("infinity times zero far out", GELU, BIAS_GELU, "  if (fabsf(z) > 64.f) return s.value;\n", ""),
    Fault("another cubic term", GELU, BIAS_GELU, "kCubic = 0.044715f", "kCubic = 0.04471f"),
    Fault("noise by column", DROPOUT, BIAS_DROPOUT,
          "      if (dropout.threshold) apply_dropout<N>(dropout, seed, to, value);",
          "      if (dropout.threshold) apply_dropout<N>(dropout, seed, at.column, value);"),
    Fault("warps' maxima read before they are written", ENTROPY, LOSS,
          "partial[thread / 32] = online;\n  __syncthreads();", "partial[thread / 32] = online;"),
    Fault("vectors from the middle of one", ENTROPY, LOSS,
          "offset == 0 ? 0 : kVector<T> - offset;", "offset == 0 ? 0 : 0;"),
    Fault("gradient in the padding", ENTROPY, LOSS, "    if (column >= real) return 0.f;\n", ""),
    Fault("minus infinity minus itself", ENTROPY, LOSS, "return value == -INFINITY ? 0.f : __expf", "return __expf"),
    Fault("label of another slice", ENTROPY, LOSS,
          "  const int64_t label = labels[blockIdx.x] - first;", "  const int64_t label = labels[blockIdx.x];"),
    Fault("maximum drops a NaN", ADAM, VARIANCE, "a > b || a != a ? a : b", "a > b ? a : b"),
    Fault("an element behind the last", ADAM, VARIANCE, "if (tail < count)", "if (tail <= count)"),
    # ---- the kernels for a CPU
    Fault("probabilities beyond the diagonal", "cpu/softmax.h", SOFT,
          "    store(probs + c, keep(e * inverse, Floats{}, lanes), lanes);\n  });\n  clear_rest(probs, of);\n",
          "    store(probs + c, keep(e * inverse, Floats{}, lanes), lanes);\n  });\n"),
    Fault("lanes beyond the row count", "cpu/layer_norm.h", NORM,
          "keep(load(x + c, lanes) - center, Floats{}, lanes)", "load(x + c, lanes) - center"),
    Fault("a new maximum without its rescaling", "cpu/cross_entropy.cpp", LOSS,
          "    if (higher > row.maximum) row.total *= exp_to_zero(broadcast(row.maximum - shift))[0];\n", ""),
    Fault("four blocks of noise twice", "cpu/noise.h", BIAS_DROPOUT,
          "high = counters(block + 4)", "high = counters(block)"),
    Fault("a group's last row left out", "cpu/column_sums.h", BIAS_DROPOUT,
          "work(first_row(p), first_row(p + 1), sums)", "work(first_row(p), first_row(p + 1) - 1, sums)"),
    Fault("bias outside of the dropout", "cpu/bias_dropout_add.cpp", BIAS_DROPOUT,
          "load(residual + c, lanes) + value(c, lanes) * factor", "load(residual + c, lanes) + value(c, lanes)"),
)
