"""Causal softmax of every backend against float64, forward and backward, with and without dropout."""

import pytest
import torch

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, check, cpu, dropout_factors, normal, same_bits
from tests.kernels.backends import KernelBackend, KernelError
from tests.kernels.calls import QUIET, Noise, causal_softmax_backward, causal_softmax_forward

SCALE = 0.3
NAN, INF = float("nan"), float("inf")
# (batch, sq, sk): the short lengths that Sequence Length Warmup starts with, with more rows than a block of each kind
# has; a row of few lanes, a warp, and warps; what 16-byte vectors do not fit; and rows longer than columns before them.
SHORT = [(3, 1, 1), (5, 7, 7), (40, 8, 8), (20, 16, 16), (5, 18, 18), (9, 24, 24), (5, 31, 31), (70, 2, 8), (3, 5, 64)]
LONG = [
    (1, 33, 264), (2, 5, 1023), (2, 5, 1024), (2, 5, 1025), (1, 200, 200), (1, 3, 2056), (1, 2, 16383),
    (1, 2, 16384),
]  # fmt: skip
NOISE = Noise(probability=0.2, seed=0x123456789ABCDEF)

EVERYWHERE = {
    "test_causal": [
        ((3, 1, 1), F32), ((5, 7, 7), F16), ((40, 8, 8), BF16), ((1, 200, 200), F32), ((1, 33, 264), F16),
        ((2, 5, 1025), BF16), ((1, 3, 2056), F16), ((1, 2, 16384), F32),
    ],
    "test_causal_with_dropout": [
        ((5, 7, 7), F32), ((40, 8, 8), F16), ((2, 5, 1024), BF16), ((2, 5, 1025), F32),
    ],
}  # fmt: skip


def _beyond(sq: int, sk: int) -> torch.Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)


def _softmax(scores: torch.Tensor, hidden: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    """torch's, in the dtype of the scores; rows that see nothing are 0."""
    probs = torch.softmax((scores * scale).masked_fill(hidden, -INF), -1)
    return probs.masked_fill(hidden, 0.0)


def _gradient(dy: torch.Tensor, probs: torch.Tensor, factors: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
    g = dy * factors.to(dy.dtype)
    return scale * probs * (g - (probs * g).sum(-1, True))


def _check_forward(got: dict[str, torch.Tensor], scores: torch.Tensor, hidden: torch.Tensor, noise: Noise) -> None:
    exact, own = _softmax(scores.double(), hidden), _softmax(scores, hidden)
    check("probs", got["probs"], exact, own)
    assert (cpu(got["probs"])[hidden.expand(exact.shape)] == 0).all()
    if noise.probability == 0:
        return
    factors = dropout_factors(scores.shape, noise.probability, noise.seed)
    check("dropped", got["dropped"], exact * factors, own * factors.to(own.dtype))
    # The mask itself, bit for bit: what is 0 where the probability is not was dropped.
    seen = exact > 1e-4
    assert torch.equal((cpu(got["dropped"]) != 0)[seen], (factors != 0)[seen])


def _check_backward(got: torch.Tensor, dy: torch.Tensor, probs: torch.Tensor, noise: Noise) -> None:
    factors = dropout_factors(dy.shape, noise.probability, noise.seed)
    clean = dy.nan_to_num(nan=0.0)
    exact, own = _gradient(clean.double(), probs.double(), factors), _gradient(clean, probs, factors)
    terms = (SCALE * probs.double() * (clean.double().abs() * factors).amax(-1, True)).amax(-1, True)
    check("dscores", got, exact, own, terms=terms)


def _planted(scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """``scores`` with NaN, which a maximum may drop, and infinity, which it may not, in turn where nothing may look."""
    filled = scores.masked_fill(hidden, NAN)
    filled[..., ::2] = scores[..., ::2].masked_fill(hidden[..., ::2], INF)
    return filled


def _check_causal(
    backend: KernelBackend, shape: tuple[int, int, int], dtype: torch.dtype, noise: Noise, *, in_place: bool = False
) -> None:
    """NaN, or infinity, is planted beyond the diagonal in everything that is read."""
    beyond = _beyond(*shape[1:])
    scores = normal(shape, dtype, seed=1, scale=4)
    got = causal_softmax_forward(backend, _planted(scores, beyond), SCALE, noise=noise)
    _check_forward(got, scores, beyond, noise)
    probs = _softmax(scores.double(), beyond).to(dtype)
    dy = normal(shape, dtype, seed=2).masked_fill(beyond, NAN)
    planted = probs.masked_fill(beyond, NAN)
    back = causal_softmax_backward(backend, dy, planted, SCALE, noise=noise, in_place=in_place)
    _check_backward(back["dscores"], dy, probs, noise)
    assert (cpu(back["dscores"])[beyond.expand(shape)] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHORT, *LONG], ids=str)
def test_causal(backend: KernelBackend, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    _check_causal(backend, shape, dtype, QUIET)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 7), (40, 8, 8), (9, 24, 24), (2, 5, 1024), (2, 5, 1025)], ids=str)
def test_causal_with_dropout(backend: KernelBackend, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    _check_causal(backend, shape, dtype, NOISE, in_place=True)


@pytest.mark.parametrize("cols", [8, 31, 264, 2048])
def test_extreme_scores(backend: KernelBackend, cols: int) -> None:
    """Scores as large as the dtype has, all equal, and rows with infinities: what torch makes of them in float64."""
    for dtype in FLOATS:
        big = min(torch.finfo(dtype).max, 1e30)
        scores = normal((1, 6, cols), dtype, seed=8)
        scores[0, 0] = big
        scores[0, 1] = -big
        scores[0, 2, ::2] = -INF
        scores[0, 3, :3] = big
        scores[0, 4] = -INF
        scores[0, 5, 0] = INF
        hidden = _beyond(6, cols)
        probs = cpu(causal_softmax_forward(backend, scores, SCALE)["probs"])
        exact, own = _softmax(scores.double(), hidden), _softmax(scores, hidden)
        check("probs", probs, exact, own)
        assert (probs[hidden.expand(probs.shape)] == 0).all()


def test_backward_in_place_gives_the_same_bits(backend: KernelBackend) -> None:
    for shape in ((9, 24, 24), (2, 5, 1025)):
        dy, scores = normal(shape, torch.float16, seed=2), normal(shape, torch.float16, seed=1)
        probs = _softmax(scores, _beyond(*shape[1:]))
        apart = causal_softmax_backward(backend, dy, probs, SCALE, noise=NOISE)["dscores"]
        same_bits(
            "dscores", causal_softmax_backward(backend, dy, probs, SCALE, noise=NOISE, in_place=True)["dscores"], apart
        )


def test_refuses(backend: KernelBackend) -> None:
    for shape, status in (((1, 1, 16385), -1), ((1, 9, 8), -2)):
        with pytest.raises(KernelError) as refused:
            causal_softmax_forward(backend, torch.zeros(shape), 1.0)
        assert refused.value.status == status
