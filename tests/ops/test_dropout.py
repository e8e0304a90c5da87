"""The reference's noise is Philox, the kernels draw the same mask, and random streams rule its seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.ops import dropout
from megatron_ext.ops.bias_dropout_add import bias_dropout_add
from megatron_ext.ops.kernels import Kernels
from tests.kernels.accuracy import philox

_MASK = 0xFFFFFFFF


def words(seed: int, blocks: list[int]) -> list[list[int]]:
    """Philox4x32-10 of the tests, which has the published answers (tests/kernels/test_noise.py)."""
    counters = np.array([(block & _MASK, block >> 32, 0, 0) for block in blocks], dtype=np.uint64)
    return [list(map(int, row)) for row in philox(counters, (seed & _MASK, (seed >> 32) & _MASK))]


@given(seed=st.integers(-(2**63), 2**63 - 1), blocks=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_words_are_philox_of_seed_and_block(seed: int, blocks: list[int]) -> None:
    assert dropout.philox(torch.tensor(blocks), torch.tensor([seed])).tolist() == words(seed, blocks)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), rate=st.floats(0.01, 0.99), seed=st.integers(0, 2**62)
)
def test_an_element_is_kept_where_its_word_reaches_the_threshold(shape: list[int], rate: float, seed: int) -> None:
    kept = dropout.kept(tuple(shape), rate, torch.tensor([seed])).flatten().tolist()
    threshold = math.floor(torch.tensor(rate, dtype=torch.float32).double().item() * 2**32)
    expected = [word for block in words(seed, list(range(-(-math.prod(shape) // 4)))) for word in block]
    assert kept == [word >= threshold for word in expected[: math.prod(shape)]]


def test_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor([77])
    whole = dropout.kept((1000,), 0.5, seed)
    monkeypatch.setattr(dropout, "_TOGETHER", 7)
    assert torch.equal(dropout.kept((1000,), 0.5, seed), whole)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (1, 1025)])
def test_fused_kernels_drop_the_same_elements(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, zero = torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    results = []
    for kernels in ("fused", "reference"):
        torch.manual_seed(5)
        results.append(bias_dropout_add(x, None, zero, dropout=0.3, kernels=kernels))
    assert torch.equal(*results)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_the_seed_follows_the_generator(kernels: Kernels) -> None:
    x = torch.ones(40, 8)

    def draw() -> torch.Tensor:
        return bias_dropout_add(x, None, x, dropout=0.5, kernels=kernels)

    state = torch.get_rng_state()
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(draw(), first)
    state = torch.get_rng_state()
    bias_dropout_add(x, None, x, dropout=0.0, kernels=kernels)
    assert torch.equal(torch.get_rng_state(), state), "no dropout draws nothing"
