"""The loss ratio against a naive loop over all earlier losses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.curriculum.loss_ratio import THRESHOLDS, LossRatio
from megatron_ext.errors import UserError

finite = st.floats(min_value=1e-3, max_value=50.0)
losses_strategy = st.lists(st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf])), max_size=60)


def naive(losses: list[float]) -> list[float]:
    ratios = []
    for step, loss in enumerate(losses):
        earlier = [value for value in losses[:step] if math.isfinite(value)]
        if not math.isfinite(loss):
            ratios.append(math.inf)
        else:
            ratios.append(loss / min(earlier) if earlier else 1.0)
    return ratios


@given(losses_strategy)
def test_equals_the_naive_definition(losses: list[float]) -> None:
    tracker = LossRatio()
    ratios = [tracker.update(loss) for loss in losses]
    expected = naive(losses)
    assert ratios == expected
    assert tracker.steps == len(losses)
    assert tracker.non_finite == sum(not math.isfinite(loss) for loss in losses)
    assert tracker.largest == max([1.0, *expected])
    assert tracker.above == {limit: sum(ratio > limit for ratio in expected) for limit in THRESHOLDS}


@given(losses_strategy, losses_strategy)
def test_resuming_changes_nothing(before: list[float], after: list[float]) -> None:
    whole, first, second = LossRatio(), LossRatio(), LossRatio()
    for loss in before:
        whole.update(loss)
        first.update(loss)
    second.load_state_dict(first.state_dict())
    assert [whole.update(loss) for loss in after] == [second.update(loss) for loss in after]
    assert whole == second


def test_first_step_is_one_and_the_minimum_is_of_earlier_steps_only() -> None:
    tracker = LossRatio()
    assert [tracker.update(loss) for loss in (4.0, 2.0, 3.0)] == [1.0, 0.5, 1.5]
    assert tracker.above == {1.1: 1, 1.2: 1, 1.5: 0, 2.0: 0}
    assert tracker.largest == 1.5


def test_non_finite_losses_do_not_become_the_lowest() -> None:
    tracker = LossRatio()
    assert [tracker.update(loss) for loss in (-math.inf, 4.0, math.nan, 6.0)] == [math.inf, 1.0, math.inf, 1.5]
    assert tracker.non_finite == 2


def test_zero_loss_divides_nothing() -> None:
    tracker = LossRatio()
    assert [tracker.update(loss) for loss in (0.0, 0.0, 1.0)] == [1.0, 1.0, math.inf]


def test_state_of_another_version_is_refused() -> None:
    state = LossRatio().state_dict()
    with pytest.raises(UserError, match="above \\[1\\.3\\]"):
        LossRatio().load_state_dict({**state, "above": [[1.3, 0]]})
    del state["lowest"]
    with pytest.raises(UserError, match="lacks lowest"):
        LossRatio().load_state_dict(state)
