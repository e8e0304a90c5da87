"""Back ends against a float64 reference, and where their dropout draws from."""

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.model.gpt import transformer_config
from megatron_ext.model.layer import ATTENTION_BACKENDS, CausalAttention, core_attention
from megatron_ext.parallel.groups import Layout
from megatron_ext.parallel.rng import RngStreams, seed_streams
from tests.model.small import assert_identical, small_model

_BACKENDS = sorted(ATTENTION_BACKENDS)
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def _build(name: str, streams: RngStreams, *, dropout: float = 0.0, width: int = 32) -> CausalAttention:
    config = transformer_config(small_model(hidden_size=width, attention_dropout=dropout))
    return core_attention(name, streams)(config=config, layer_number=1)


@pytest.fixture(scope="module")
def streams(layout: Layout) -> RngStreams:
    return seed_streams(11, layout, torch.device("cpu"))


def _float64_reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One query at a time, in float64, with no mask: position i sees 0..i."""
    query, key, value = query.double(), key.double(), value.double()
    rows = []
    for i in range(query.shape[0]):
        scores = torch.einsum("bnd,sbnd->bns", query[i], key[: i + 1]) / math.sqrt(query.shape[-1])
        rows.append(torch.einsum("bns,sbnd->bnd", scores.softmax(-1), value[: i + 1]))
    return torch.stack(rows).flatten(2)


@pytest.mark.parametrize("name", _BACKENDS)
@pytest.mark.parametrize("dtype", list(_TOLERANCE), ids=str)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.tuples(st.integers(1, 70), st.integers(1, 3), st.sampled_from([1, 8, 20])))
def test_equal_to_the_float64_reference(
    streams: RngStreams, name: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    length, batch, head = shape
    generator = torch.Generator().manual_seed(length)
    # As the model makes them: slices of one tensor, not contiguous.
    mixed = (1.5 * torch.randn(length, batch, 4, 3 * head, generator=generator)).to(dtype).requires_grad_()
    query, key, value = mixed.chunk(3, dim=-1)
    context = _build(name, streams, width=4 * head)(query, key, value, None, attn_mask_type=None)
    upstream = torch.randn(context.shape, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad(context, mixed, upstream)

    exact = mixed.detach().double().requires_grad_()
    expected = _float64_reference(*exact.chunk(3, dim=-1))
    (exact_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    assert context.dtype == dtype
    # Scores that are rounded to 16 bits cost some of a probability's digits.
    rounds_scores = name == "fused_softmax" and dtype in {torch.float16, torch.bfloat16}
    tolerance = _TOLERANCE[dtype] * (4 if rounds_scores else 1)
    torch.testing.assert_close(context.double(), expected, rtol=tolerance, atol=tolerance)
    scale = exact_gradient.abs().max().clamp(min=1.0)
    torch.testing.assert_close(gradient.double() / scale, exact_gradient / scale, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("name", _BACKENDS)
def test_large_fp16_scores_do_not_overflow(streams: RngStreams, name: str) -> None:
    query = torch.full((4, 1, 4, 64), 60.0, dtype=torch.float16)
    context = _build(name, streams, width=256)(query, query, query)
    torch.testing.assert_close(context, torch.full((4, 1, 256), 60.0, dtype=torch.float16))


@pytest.mark.parametrize("name", _BACKENDS)
def test_dropout_drops_probabilities_of_the_partitioned_stream(streams: RngStreams, name: str) -> None:
    rate, length = 0.25, 64
    attention = _build(name, streams, dropout=rate, width=4 * length)
    query = torch.randn(length, 2, 4, length)
    # With the identity as values the context is the probabilities themselves.
    value = torch.eye(length)[:, None, None, :].expand(length, 2, 4, length)
    kept = attention.eval()(query, query, value)
    state = streams.snapshot()
    dropped = attention.train()(query, query, value)
    assert torch.equal(streams.snapshot().replicated, state.replicated)
    assert not torch.equal(streams.snapshot().partitioned, state.partitioned)
    assert not torch.equal(attention(query, query, value), dropped)
    with streams.replay(state):
        assert torch.equal(attention(query, query, value), dropped)

    zeroed = (kept > 0) & (dropped == 0)
    torch.testing.assert_close(dropped[~zeroed], kept[~zeroed] / (1 - rate), rtol=1e-4, atol=1e-6)
    assert float(zeroed.sum() / (kept > 0).sum()) == pytest.approx(rate, abs=0.02)


@pytest.mark.parametrize("name", _BACKENDS)
@pytest.mark.parametrize(("training", "dropout"), [(False, 0.5), (True, 0.0)])
def test_nothing_is_drawn_without_dropout(streams: RngStreams, name: str, training: bool, dropout: float) -> None:
    attention = _build(name, streams, dropout=dropout).train(training)
    query = torch.randn(5, 2, 4, 8)
    before = streams.snapshot()
    attention(query, query, query)
    assert_identical(astuple(streams.snapshot()), astuple(before))
