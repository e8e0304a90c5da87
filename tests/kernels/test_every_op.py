"""What holds for every op: the same bytes from run to run and in every order of threads, and right at any address."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.kernels import calls
from tests.kernels.accuracy import cpu, normal, same_bits
from tests.kernels.backends import BACKENDS, KernelBackend
from tests.kernels.building import CannotBuildError

EVERYWHERE = {
    # One thread at a time gives the same bytes by its nature.
    "test_from_run_to_run": [("cpu-threads",)],
    "test_results_are_those_of_aligned_tensors": [(24,)],
}
Results = dict[str, torch.Tensor]
NOISE = calls.Noise(probability=0.2, seed=11)
PARTITIONS = 3


def _layer_norm(backend: KernelBackend, cols: int, *, rows: int = 50, partitions: int = PARTITIONS) -> Results:
    x, dy = normal((rows, cols), torch.float16, seed=1), normal((rows, cols), torch.float16, seed=2)
    weight, bias = normal((cols,), torch.float32, seed=3), normal((cols,), torch.float32, seed=4)
    forward = calls.layer_norm_forward(backend, x, weight, bias)
    mean, rstd = forward["mean"].cpu(), forward["rstd"].cpu()
    return forward | calls.layer_norm_backward(backend, dy, x, weight, statistics=(mean, rstd), partitions=partitions)


def _add_layer_norm(backend: KernelBackend, cols: int, *, partitions: int = PARTITIONS) -> Results:
    x, residual, dy, dsum = (normal((50, cols), torch.bfloat16, seed=seed) for seed in range(4))
    weight, bias = normal((cols,), torch.bfloat16, seed=5), normal((cols,), torch.bfloat16, seed=6)
    forward = calls.add_layer_norm_forward(backend, x, bias, residual, (weight, bias), noise=NOISE)
    statistics = forward["mean"].cpu(), forward["rstd"].cpu()
    return forward | calls.add_layer_norm_backward(
        backend, (dy, dsum), (forward["sum"].cpu(), *statistics), weight,
        with_x_bias=True, partitions=partitions, noise=NOISE,
    )  # fmt: skip


def _causal_softmax(backend: KernelBackend, cols: int) -> Results:
    scores, dy = normal((2, 9, cols), torch.float32, seed=1), normal((2, 9, cols), torch.float32, seed=2)
    forward = calls.causal_softmax_forward(backend, scores, 0.5, noise=NOISE)
    return forward | calls.causal_softmax_backward(backend, dy, forward["probs"].cpu(), 0.5, noise=NOISE)


def _bias_gelu(backend: KernelBackend, cols: int, *, rows: int = 150, partitions: int = PARTITIONS) -> Results:
    x, dy, bias = (normal(shape, torch.float16, seed=1) for shape in ((rows, cols), (rows, cols), (cols,)))
    forward = calls.bias_gelu_forward(backend, x, bias, exact=False)
    return forward | calls.bias_gelu_backward(backend, dy, x, bias, exact=True, partitions=partitions)


def _bias_dropout_add(backend: KernelBackend, cols: int, *, rows: int = 150, partitions: int = PARTITIONS) -> Results:
    x, residual, bias = (normal(shape, torch.float16, seed=1) for shape in ((rows, cols), (rows, cols), (cols,)))
    forward = calls.bias_dropout_add_forward(backend, x, bias, residual, noise=NOISE)
    return forward | calls.bias_dropout_add_backward(backend, x, x.dtype, partitions=partitions, noise=NOISE)


def _cross_entropy(backend: KernelBackend, cols: int) -> Results:
    logits, labels, grad = normal((5, cols), torch.bfloat16, seed=1), torch.arange(5), torch.ones(5)
    forward = calls.cross_entropy_forward(backend, logits, labels, first=2, real=cols - 1)
    statistics = forward["maximum"].cpu(), forward["total"].cpu(), grad
    return forward | calls.cross_entropy_backward(backend, logits, labels, statistics, first=2, real=cols - 1)


def _adam_variance(backend: KernelBackend, cols: int) -> Results:
    return calls.adam_variance(backend, normal((9 * cols,), torch.float32, seed=1).abs(), partitions=PARTITIONS)


Op = Callable[..., Results]
OPS: list[Op] = [
    _layer_norm,
    _add_layer_norm,
    _causal_softmax,
    _bias_gelu,
    _bias_dropout_add,
    _cross_entropy,
    _adam_variance,
]


# A vector's multiple or not, rows of a warp or less and of several warps.
COLS = [24, 31, 1048, 1025]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_in_every_order(op: Op) -> None:
    try:
        forward, *others = (BACKENDS[f"emulator-{order}"]() for order in ("forward", "reverse", "random"))
    except CannotBuildError as missing:
        pytest.skip(str(missing))
    for cols in COLS:
        expected = op(forward, cols)
        for other in others:
            for name, value in op(other, cols).items():
                same_bits(f"{name} of {cols} columns on {other.name}", value, expected[name])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_from_run_to_run(backend: KernelBackend, op: Op) -> None:
    for cols in COLS[2:]:
        expected = op(backend, cols)
        for name, value in op(backend, cols).items():
            same_bits(f"{name} of {cols} columns", value, expected[name])


@dataclass(frozen=True)
class Shifted:
    """A backend whose tensors begin one element behind a multiple of 16 bytes, and end where memory does."""

    backend: KernelBackend

    @property
    def name(self) -> str:
        return self.backend.name

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        return self.empty(*value.shape, dtype=value.dtype, alignment=alignment).copy_(value)

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        # Scratch memory and statistics are no views of anything: callers allocate them.
        if dtype in {torch.float64, torch.int64} or (dtype == torch.float32 and len(shape) == 3):
            return self.backend.empty(*shape, dtype=dtype, alignment=alignment)
        count = torch.Size(shape).numel()
        return self.backend.empty(count + 1, dtype=dtype, alignment=alignment)[1:].view(shape)

    def call(self, function: str, *arguments: torch.Tensor | int | float | None) -> None:
        self.backend.call(function, *arguments)

    def partitions(self, rows: int, cols: int) -> int:
        return self.backend.partitions(rows, cols)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("cols", [24, 264])
def test_results_are_those_of_aligned_tensors(backend: KernelBackend, op: Op, cols: int) -> None:
    _close(op(Shifted(backend), cols), op(backend, cols))


def _close(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        got, right = cpu(value).double(), cpu(expected[name]).double()
        assert torch.equal(got.isfinite(), right.isfinite()), name
        # Sums in another order, rounded once: a unit in the last place of the largest.
        unit = max(torch.finfo(value.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        assert (got - right).abs().max() <= 2 * unit * right.abs().max(), name


WITH_SUMS: list[Op] = [_layer_norm, _add_layer_norm, _bias_gelu, _bias_dropout_add]


@pytest.mark.parametrize("partitions", [1, 40, 600])
@pytest.mark.parametrize("op", WITH_SUMS, ids=lambda op: op.__name__)
def test_any_number_of_partitions(backend: KernelBackend, op: Op, partitions: int) -> None:
    for cols in (24, 31):
        _close(op(backend, cols, partitions=partitions), op(backend, cols))


@pytest.mark.parametrize("op", [_layer_norm, _bias_gelu, _bias_dropout_add], ids=lambda op: op.__name__)
def test_no_rows(backend: KernelBackend, op: Op) -> None:
    sums = [value for name, value in op(backend, 24, rows=0).items() if name in {"dweight", "dbias"}]
    assert sums
    assert all((cpu(value) == 0).all() for value in sums)
