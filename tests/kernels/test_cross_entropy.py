"""Cross-entropy over a slice of the vocabulary of every backend against float64, alone and put together from slices."""

import pytest
import torch

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, check, cpu, normal, same_bits
from tests.kernels.backends import KernelBackend
from tests.kernels.calls import cross_entropy_backward, cross_entropy_forward

INF = float("inf")
# (rows, columns, of which real): vectors at the start of each row or anywhere, a row shorter than a vector, and more
# than the block takes at once (256 threads x 4 vectors).
SHAPES = [
    (3, 1, 1), (5, 7, 5), (9, 8, 8), (5, 16, 9), (5, 18, 17), (5, 31, 31), (4, 1023, 1000), (3, 1024, 1001),
    (3, 1025, 1025),
]  # fmt: skip
WIDE = [(2, 16384, 16384), (2, 12345, 12340)]
FIRST = 1000

EVERYWHERE = {
    "test_slice": [
        ((3, 1, 1), F32), ((5, 7, 5), BF16), ((9, 8, 8), F16), ((5, 31, 31), F32), ((4, 1023, 1000), F32),
        ((2, 12345, 12340), BF16),
    ],
}  # fmt: skip


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with NaN in the padding, labels in and around the slice, gradients of the rows' losses."""
    rows, cols, real = shape
    logits = normal((rows, cols), dtype, seed=1, scale=3)
    logits[:, real:] = float("nan")
    labels = FIRST + torch.arange(rows) * 7 % real
    labels[-1] = FIRST + real - 1
    labels[0] = FIRST
    if rows > 2:
        labels[1], labels[2] = FIRST - 1, FIRST + real
    return logits, labels, normal((rows,), torch.float32, seed=2)


def _statistics(logits: torch.Tensor, labels: torch.Tensor, real: int) -> dict[str, torch.Tensor]:
    seen = logits[:, :real]
    maximum = seen.amax(-1)
    place = labels - FIRST
    inside = (place >= 0) & (place < real)
    target = seen.gather(1, place.clamp(0, real - 1).unsqueeze(1)).squeeze(1)
    total = (seen - maximum.unsqueeze(1)).exp().sum(-1)
    return {"maximum": maximum, "total": total, "target": target.where(inside, torch.zeros_like(target))}


def _gradient(
    logits: torch.Tensor, labels: torch.Tensor, statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor], real: int
) -> torch.Tensor:
    maximum, total, grad = (each.to(logits.dtype).unsqueeze(1) for each in statistics)
    hit = (torch.arange(logits.shape[1]) + FIRST == labels.unsqueeze(1)).to(logits.dtype)
    d = grad * ((logits - maximum).exp() / total - hit)
    return d.masked_fill(torch.arange(logits.shape[1]) >= real, 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
def test_slice(backend: KernelBackend, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    real = shape[2]
    logits, labels, grad = _inputs(shape, dtype)
    got = cross_entropy_forward(backend, logits, labels, first=FIRST, real=real)
    exact, own = _statistics(logits.double(), labels, real), _statistics(logits.float(), labels, real)
    for name, value in got.items():
        check(name, value.unsqueeze(-1), exact[name].unsqueeze(-1), own[name].unsqueeze(-1))
    # The whole vocabulary's statistics are not the slice's: here they are those of twice as much.
    statistics = (exact["maximum"] + 0.5).float(), (exact["total"] * 2).float(), grad
    changed = cross_entropy_backward(backend, logits, labels, statistics, first=FIRST, real=real)["dlogits"]
    true = _gradient(logits.double(), labels, statistics, real)
    own_gradient = _gradient(logits.float(), labels, statistics, real).to(dtype)
    check("dlogits", changed, true, own_gradient)
    assert (cpu(changed)[:, real:] == 0).all()


def test_a_slice_without_ids(backend: KernelBackend) -> None:
    logits, labels = torch.full((3, 24), float("nan")), torch.tensor([0, 5, 99])
    got = cross_entropy_forward(backend, logits, labels, first=50, real=0)
    assert cpu(got["maximum"]).tolist() == [-INF] * 3
    assert cpu(got["total"]).tolist() == [0.0] * 3
    assert cpu(got["target"]).tolist() == [0.0] * 3
    ones = torch.ones(3)
    assert (
        cpu(cross_entropy_backward(backend, logits, labels, (ones, ones, ones), first=50, real=0)["dlogits"]) == 0
    ).all()


@pytest.mark.parametrize("cols", [24, 31, 9000])
def test_extreme_logits(backend: KernelBackend, cols: int) -> None:
    """Sums that overflow without a maximum, -inf that counts for nothing, and a maximum that comes last."""
    for dtype in FLOATS:
        big = min(torch.finfo(dtype).max, 1e30)
        logits = normal((5, cols), dtype, seed=4)
        logits[0] = big
        logits[1] = -big
        logits[2, : cols - 1] = -INF
        logits[3] = torch.arange(cols).to(dtype) - cols
        logits[4, 5] = -INF
        labels = torch.full((5,), FIRST + cols - 1)
        got = cross_entropy_forward(backend, logits, labels, first=FIRST, real=cols)
        exact, own = _statistics(logits.double(), labels, cols), _statistics(logits.float(), labels, cols)
        for name, value in got.items():
            check(name, value.unsqueeze(-1), exact[name].unsqueeze(-1), own[name].unsqueeze(-1))


def test_not_finite_rows(backend: KernelBackend) -> None:
    logits = normal((4, 40), torch.float32, seed=5)
    logits[1, 7], logits[2, 9] = float("nan"), INF
    labels = torch.full((4,), FIRST)
    got = cross_entropy_forward(backend, logits, labels, first=FIRST, real=40)
    assert cpu(got["total"]).isnan().tolist() == [False, True, True, False]


def test_rows_that_begin_anywhere(backend: KernelBackend) -> None:
    """What is before and behind the vectors of a row: the same results wherever the row begins."""
    wide = normal((8, 41), torch.float16, seed=6)
    labels, real = torch.full((8,), FIRST + 3), 41
    got = cross_entropy_forward(backend, wide, labels, first=FIRST, real=real)
    for row in range(8):
        alone = cross_entropy_forward(backend, wide[row : row + 1], labels[:1], first=FIRST, real=real)
        same_bits("maximum", got["maximum"][row : row + 1], alone["maximum"])
        check("total", got["total"][row : row + 1], cpu(alone["total"]).double(), cpu(alone["total"]))
