"""Streams agree and differ where they must and continue where they were; recomputation draws again from them."""

import contextlib
import functools
import io
import itertools
import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import Layout, initialize_parallel
from megatron_ext.parallel.rng import RngStreams, recompute, seed_streams
from tests.ranks import run_ranks

_CPU = torch.device("cpu")
_identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture
def streams(layout: Layout) -> RngStreams:
    return seed_streams(7, layout, _CPU)


def _draw(streams: RngStreams) -> tuple[torch.Tensor, torch.Tensor]:
    replicated = torch.rand(4)
    with streams.fork():
        partitioned = torch.rand(4)
    return replicated, partitioned


def _draws(_rank: int, _world_size: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    streams = seed_streams(seed, initialize_parallel(2, 5.0), _CPU)
    return [_draw(streams) for _ in range(2)]


def test_replicated_agrees_within_a_copy_and_all_else_differs() -> None:
    ranks = run_ranks(_draws, 4, 1234)
    for step, rank in itertools.product(range(2), (0, 2)):
        assert torch.equal(ranks[rank][step][0], ranks[rank + 1][step][0])
    distinct = [ranks[rank][step][0] for rank in (0, 2) for step in range(2)]
    distinct += [ranks[rank][step][1] for rank in range(4) for step in range(2)]
    assert len({tuple(draw.tolist()) for draw in distinct}) == len(distinct)


def test_the_same_seed_gives_the_same_streams_and_the_next_seed_others(layout: Layout) -> None:
    first, again, other = (_draw(seed_streams(seed, layout, _CPU)) for seed in (7, 7, 8))
    _identical(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_fork_leaves_the_replicated_stream_alone_also_after_an_error(layout: Layout) -> None:
    streams = seed_streams(7, layout, _CPU)
    expected = torch.rand(6)
    streams = seed_streams(7, layout, _CPU)
    first = torch.rand(3)
    with contextlib.suppress(KeyError), streams.fork():
        torch.rand(100)
        raise KeyError
    assert torch.equal(torch.cat([first, torch.rand(3)]), expected)


def test_the_partitioned_stream_continues_from_fork_to_fork(layout: Layout) -> None:
    streams = seed_streams(7, layout, _CPU)
    with streams.fork():
        expected = torch.rand(6)
    streams = seed_streams(7, layout, _CPU)
    parts = []
    for _ in range(2):
        torch.rand(5)
        with streams.fork():
            parts.append(torch.rand(3))
    assert torch.equal(torch.cat(parts), expected)


def test_forks_do_not_nest(streams: RngStreams) -> None:
    with streams.fork(), pytest.raises(AssertionError), streams.fork():
        pass


def test_replay_repeats_and_then_continues(layout: Layout) -> None:
    streams = seed_streams(7, layout, _CPU)
    snapshot = streams.snapshot()
    first, second = _draw(streams), _draw(streams)
    streams = seed_streams(7, layout, _CPU)
    drawn = _draw(streams)
    with streams.replay(snapshot):
        replayed = _draw(streams)
    _identical((drawn, replayed, _draw(streams)), (first, first, second))


def test_state_restores_everything_random_through_a_file(streams: RngStreams, layout: Layout) -> None:
    def draw_all(streams: RngStreams) -> list[float]:
        tensors = torch.cat(_draw(streams)).tolist()
        return [*tensors, random.random(), float(np.random.rand()), float(np.random.randn())]

    draw_all(streams)
    file = io.BytesIO()
    torch.save(streams.rng_state(), file)
    expected = [draw_all(streams) for _ in range(3)]
    restored = seed_streams(99, layout, _CPU)
    file.seek(0)
    restored.set_rng_state(torch.load(file, weights_only=True))
    assert [draw_all(restored) for _ in range(3)] == expected


def test_the_state_of_another_kind_of_device_is_refused_and_changes_nothing(streams: RngStreams) -> None:
    state = streams.rng_state()
    foreign = state | {"replicated": torch.zeros(16, dtype=torch.uint8), "python": random.Random(1).getstate()}
    with pytest.raises(UserError, match="not one of a cpu generator"):
        streams.set_rng_state(foreign)
    assert random.getstate() == state["python"]


def _run_blocks(streams: RngStreams, *, recomputed: bool) -> tuple[torch.Tensor, ...]:
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


def test_bitwise_equal_to_the_plain_run_blocks(streams: RngStreams) -> None:
    start = streams.rng_state()
    plain = _run_blocks(streams, recomputed=False)
    streams.set_rng_state(start)
    again = _run_blocks(streams, recomputed=True)
    _identical(again, plain)


def test_an_input_without_gradient_is_refused(streams: RngStreams) -> None:
    with pytest.raises(AssertionError, match="requires a gradient"):
        recompute(torch.tanh, torch.randn(2), streams=streams)
