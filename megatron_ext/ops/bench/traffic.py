"""Bytes that an operation cannot avoid to move: every input read once, every result written once. Imports no torch.

A rate computed from them is at most the memory's, unless the caches hold what is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType


@dataclass(frozen=True)
class Case:
    """An operation on one size of problem. ``shape`` is that of its largest input."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    """"float32", "float16" or "bfloat16"."""

    @property
    def width(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "float32" else 2

    @property
    def rows(self) -> int:
        """Rows of the matrix that the input is."""
        return prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Columns of that matrix."""
        return self.shape[-1]

    @property
    def bytes(self) -> int:
        """Size of the largest input."""
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


def _masked_softmax(case: Case) -> Traffic:
    batch, _, queries, keys = case.shape
    return Traffic(2 * case.bytes + batch * queries * keys, 3 * case.bytes)


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
        "masked_softmax": _masked_softmax,
        "bias_gelu": _bias_gelu,
        "bias_dropout_add": _bias_dropout_add,
        "cross_entropy": _cross_entropy,
        "adam_variance": _adam_variance,
    }
)
OPERATIONS = tuple(_TRAFFIC)

GPT2_VOCABULARY = 50304


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
        Case("masked_softmax", (batch, heads, length, length), dtype),
        Case("bias_gelu", (tokens, 4 * hidden), dtype),
        Case("bias_dropout_add", (tokens, hidden), dtype),
        Case("cross_entropy", (tokens, vocabulary), dtype),
        Case("adam_variance", (parameters,), "float32"),
    ]
