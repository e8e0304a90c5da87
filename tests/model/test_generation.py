"""Sampling follows the logits, and all tensor ranks get the same text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.model.generation import Sampling, generate
from megatron_ext.model.gpt import Gpt
from megatron_ext.parallel.groups import Layout, initialize_parallel
from tests.model.small import POSITIONS, build_small, random_tokens, shake
from tests.ranks import run_ranks

_GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def model(layout: Layout) -> Gpt:
    model = build_small(layout, hidden_dropout=0.1)
    shake(model)
    return model


def test_greedy_is_the_argmax_step_by_step_past_the_position_table(model: Gpt) -> None:
    start = random_tokens(3, 35)
    result = generate(model, start, max_new_tokens=12, sampling=_GREEDY)
    assert result.shape == (3, 47)
    assert torch.equal(result[:, :35], start)
    assert model.training
    model.eval()
    for position in range(35, 47):
        seen = result[:, max(0, position - POSITIONS) : position]
        assert torch.equal(model(seen)[:, -1].argmax(-1), result[:, position])


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(model: Gpt) -> None:
    start = random_tokens(2, 4)
    greedy = generate(model, start, max_new_tokens=8, sampling=_GREEDY)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-6)):
        assert torch.equal(generate(model, start, max_new_tokens=8, sampling=sampling), greedy)


def test_the_generator_decides_and_dropout_is_off(model: Gpt) -> None:
    start = random_tokens(2, 4)

    def draw(seed: int) -> torch.Tensor:
        return generate(model, start, max_new_tokens=10, generator=torch.Generator().manual_seed(seed))

    before = model.streams.snapshot()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(model.streams.snapshot().replicated, before.replicated)


def test_stops_when_every_sequence_has_stopped_and_fills_up(model: Gpt) -> None:
    start = random_tokens(2, 4)
    free = generate(model, start, max_new_tokens=10, sampling=_GREEDY)
    stop = int(free[0, 5])
    rows = free[:, 4:].tolist()
    ends = [row.index(stop) + 1 if stop in row else 10 for row in rows]
    expected = [row[:end] + [stop] * (max(ends) - end) for row, end in zip(rows, ends, strict=True)]
    result = generate(model, start, max_new_tokens=10, sampling=_GREEDY, stop_token=stop)
    assert result[:, 4:].tolist() == expected
    alone = generate(model, start[:1], max_new_tokens=10, sampling=_GREEDY, stop_token=stop)
    assert alone.shape[1] == 4 + ends[0]


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1.0),
    temperature=st.floats(0.2, 3.0),
)
def test_drawn_tokens_are_in_the_smallest_allowed_set(
    logits: list[float], top_k: int | None, top_p: float | None, temperature: float
) -> None:
    row = torch.tensor(logits)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or None]
    probabilities = (row[order].double() / temperature).softmax(-1).tolist()
    threshold, total = 1.0, 0.0
    for probability, token in zip(probabilities, order, strict=True):
        if total < (top_p or 1.0) - 1e-6:
            threshold = logits[token]
        total += probability
    drawn = Sampling(temperature, top_k, top_p).draw(row.expand(200, -1), torch.Generator().manual_seed(0))
    # By value, so that ties may fall either way.
    assert float(row[drawn].min()) >= threshold - 1e-5


def test_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = Sampling(temperature=2.0).draw(logits.expand(40_000, -1), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn.flatten(), minlength=4) / 40_000
    torch.testing.assert_close(frequencies, (logits / 2).softmax(-1), rtol=0, atol=0.01)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be"):
        Sampling(**bad)  # type: ignore[arg-type]


def _generate(rank: int, _world_size: int, tensor: int) -> tuple[torch.Tensor, torch.Tensor]:
    model = build_small(initialize_parallel(tensor, 5.0))
    start = random_tokens(2, 4)
    greedy = generate(model, start, max_new_tokens=10, sampling=_GREEDY)
    # Every rank brings another generator; the first rank's counts.
    return greedy, generate(model, start, max_new_tokens=10, generator=torch.Generator().manual_seed(rank))


def test_tensor_ranks_agree_and_greedy_equals_one_rank() -> None:
    ((greedy, sampled),) = run_ranks(_generate, 1, 1)
    for result in run_ranks(_generate, 2, 2):
        assert torch.equal(result[0], greedy)
        assert torch.equal(result[1], sampled)
