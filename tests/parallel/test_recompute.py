"""Recomputation with dropout gives the gradients of the plain run, bit for bit."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from megatron_ext.parallel.groups import initialize_parallel
from megatron_ext.parallel.rng import RngStreams, recompute, seed_streams
from tests.ranks import single_rank


@pytest.fixture
def streams() -> Iterator[RngStreams]:
    with single_rank():
        yield seed_streams(3, initialize_parallel(1, 5.0), torch.device("cpu"))


def _run(streams: RngStreams, *, recomputed: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    weight = torch.randn(16, 16, requires_grad=True)
    hidden = torch.randn(8, 16, requires_grad=True)
    calls = []

    def block(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        with streams.fork():
            x = functional.dropout(x @ weight, 0.3)
        return functional.dropout(x.tanh(), 0.2)

    out = hidden * 2
    for _ in range(3):
        out = recompute(block, out, streams=streams) if recomputed else block(out)
    torch.autograd.backward(out.square().sum())
    assert len(calls) == (6 if recomputed else 3)
    assert weight.grad is not None
    assert hidden.grad is not None
    # What is drawn next shows that backward left the streams where forward had them.
    with streams.fork():
        return out.detach(), weight.grad, hidden.grad, torch.rand(4), torch.rand(4)


def test_bitwise_equal_to_the_plain_run(streams: RngStreams) -> None:
    start = streams.rng_state()
    plain = _run(streams, recomputed=False)
    streams.set_rng_state(start)
    again = _run(streams, recomputed=True)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_an_input_without_gradient_is_refused(streams: RngStreams) -> None:
    with pytest.raises(AssertionError, match="requires a gradient"):
        recompute(torch.tanh, torch.randn(2), streams=streams)
