"""The operations that are measured, the bytes each cannot avoid to move, and the figures that follow. Imports no torch.

Every input is read once and every result written once: a rate computed from these bytes is at most the memory's,
unless the caches hold what is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from types import MappingProxyType
from typing import Any

FUSED = "fused"
GPT2_VOCABULARY = 50304


@dataclass(frozen=True)
class Case:
    """An operation on inputs of one size. ``shape`` is that of the largest."""

    op: str
    shape: tuple[int, ...]
    dtype: str  # "float32", "float16" or "bfloat16"

    @property
    def width(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.width

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}"


@dataclass(frozen=True)
class Traffic:
    """Bytes moved by the forward and by the backward pass."""

    forward: int
    backward: int


def traffic(case: Case) -> Traffic:
    """What ``case`` moves. Parameters and their gradients count as well as activations and statistics."""
    return _TRAFFIC[case.op](case)


def _layer_norm(case: Case) -> Traffic:
    n, parameters, statistics = case.bytes, case.cols * case.width, 2 * case.rows * 4
    # Forward: x -> y. Backward: dy, x -> dx; weight -> dweight, dbias.
    return Traffic(2 * n + 2 * parameters + statistics, 3 * n + 3 * parameters + statistics)


def _add_layer_norm(case: Case) -> Traffic:
    n, parameters, statistics = case.bytes, case.cols * case.width, 2 * case.rows * 4
    # Forward: x, residual -> sum, y. Backward: dy, dsum, sum -> dresidual, dx (another one, because of dropout).
    return Traffic(4 * n + 3 * parameters + statistics, 5 * n + 4 * parameters + statistics)


def _causal_softmax(case: Case) -> Traffic:
    queries, keys = case.shape[-2:]
    seen = prod(case.shape[:-2]) * sum(min(keys, i + 1 + keys - queries) for i in range(queries)) * case.width
    # What lies beyond the diagonal is not read, and written as 0.
    return Traffic(seen + case.bytes, 2 * seen + case.bytes)


def _bias_gelu(case: Case) -> Traffic:
    return Traffic(2 * case.bytes + case.cols * case.width, 3 * case.bytes + 2 * case.cols * case.width)


def _bias_dropout_add(case: Case) -> Traffic:
    # Forward: x, residual -> y. Backward: dy -> dx; dy is the residual's gradient as it is.
    return Traffic(3 * case.bytes + case.cols * case.width, 2 * case.bytes + case.cols * case.width)


def _cross_entropy(case: Case) -> Traffic:
    # Three statistics, a label; then the logits again, and their gradient over them.
    return Traffic(case.bytes + case.rows * (8 + 3 * 4), 2 * case.bytes + case.rows * (8 + 3 * 4))


def _adam_variance(case: Case) -> Traffic:
    return Traffic(case.bytes, 0)


_TRAFFIC: Mapping[str, Callable[[Case], Traffic]] = MappingProxyType(
    {
        "layer_norm": _layer_norm,
        "add_layer_norm": _add_layer_norm,
        "causal_softmax": _causal_softmax,
        "bias_gelu": _bias_gelu,
        "bias_dropout_add": _bias_dropout_add,
        "cross_entropy": _cross_entropy,
        "adam_variance": _adam_variance,
    }
)
OPERATIONS = tuple(_TRAFFIC)


def cases(sizes: str, dtype: str) -> list[Case]:
    """One case for each operation.

    Args:
        sizes: "gpt2": a micro-batch of 4 sequences of 1,024 tokens of GPT-2 117M; "large": what fills a large GPU, in
            which no cache holds anything; "small": what a test has time for.
        dtype: Of activations and parameters; the second moment of Adam is float32 always.
    """
    tokens, hidden, heads, length, vocabulary, parameters = {
        "gpt2": (4096, 768, 12, 1024, GPT2_VOCABULARY, 124_000_000),
        "large": (32768, 4096, 32, 4096, GPT2_VOCABULARY, 1_000_000_000),
        "small": (64, 64, 2, 32, 512, 10_000),
    }[sizes]
    batch = max(1, tokens // length)
    return [
        Case("layer_norm", (tokens, hidden), dtype),
        Case("add_layer_norm", (tokens, hidden), dtype),
        Case("causal_softmax", (batch, heads, length, length), dtype),
        Case("bias_gelu", (tokens, 4 * hidden), dtype),
        Case("bias_dropout_add", (tokens, hidden), dtype),
        Case("cross_entropy", (tokens, vocabulary), dtype),
        Case("adam_variance", (parameters,), "float32"),
    ]


@dataclass(frozen=True)
class Measured:
    """Median seconds of each implementation, "fused" among them, and why others could not run."""

    case: Case
    forward: Mapping[str, float]
    both: Mapping[str, float]  # forward and backward; empty where there is no backward
    failures: Mapping[str, str]


@dataclass(frozen=True)
class Figures:
    """The figures of one case and direction ("forward", "backward"), of the fused kernel."""

    case: Case
    direction: str
    microseconds: float
    gigabytes_per_second: float
    share_of_copy: float  # of the rate at which the device copies
    # How many times as long each other implementation took; for the backward, forward and backward together.
    ratios: Mapping[str, float]


def figures(measured: Measured, *, copy_bytes_per_second: float) -> list[Figures]:
    """The figures of both directions. The backward's time is that of both less the forward's."""
    moved = traffic(measured.case)
    rows = [("forward", measured.forward, measured.forward[FUSED], moved.forward)]
    if measured.both:
        rows.append(("backward", measured.both, measured.both[FUSED] - measured.forward[FUSED], moved.backward))
    found = []
    for direction, seconds, taken, moved_bytes in rows:
        rate = moved_bytes / taken if taken > 0 else float("nan")
        ratios = {name: value / seconds[FUSED] for name, value in seconds.items() if name != FUSED}
        share = rate / copy_bytes_per_second
        found.append(Figures(measured.case, direction, 1e6 * taken, rate / 1e9, share, ratios))
    return found


def table(rows: Sequence[Figures]) -> str:
    """The figures as lines of text, aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    lines = [["operation", "direction", "us", "GB/s", "of copy", *(f"/ {name}" for name in names)]]
    for row in rows:
        ratios = [f"{row.ratios[name]:.2f}x" if name in row.ratios else "-" for name in names]
        numbers = [f"{row.microseconds:.1f}", f"{row.gigabytes_per_second:.1f}", f"{100 * row.share_of_copy:.0f}%"]
        lines.append([str(row.case), row.direction, *numbers, *ratios])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_json(
    measured: Sequence[Measured], rows: Sequence[Figures], *, copy_bytes_per_second: float, device: str
) -> dict[str, Any]:
    """Everything, as JSON values."""
    return {
        "device": device,
        "copy_gigabytes_per_second": copy_bytes_per_second / 1e9,
        "figures": [asdict(row) for row in rows],
        "measured": [asdict(one) for one in measured],
    }
