"""The loss ratio against a naive loop over all earlier losses, and the decisions of the guards, step by step."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.curriculum.guards import THRESHOLDS, Guard, GuardsConfig, Incident, LossRatio
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


ACTIONS = ("log", "stop", "skip", "rollback")


def config(**values: Any) -> GuardsConfig:
    return GuardsConfig.model_validate_json(json.dumps(values))


def new_guard(**values: Any) -> Guard:
    """A guard of a run whose lowest loss is 1, so that a loss is its own ratio."""
    loss_ratio = LossRatio()
    loss_ratio.update(1.0)
    return Guard(config(**values), loss_ratio)


def ratio_guard(action: str, *, steps: int = 1, **values: Any) -> Guard:
    return new_guard(loss_ratio={"above": 2.0, "steps": steps, "action": action}, **values)


def observe(guard: Guard, loss: float, grad_norm: float | None = 1.0) -> Incident | None:
    admitted = guard.admits(loss=loss, grad_norm=grad_norm)
    assert admitted == (guard.incident is None or guard.incident.action == "log")
    return guard.incident


def actions(guard: Guard, losses: list[float]) -> list[str]:
    return [incident.action if (incident := observe(guard, loss)) else "" for loss in losses]


def test_the_ratio_has_to_stay_high() -> None:
    guard = ratio_guard("skip", steps=3)
    assert actions(guard, [3, 3, 2.0, 3, 3, 3, 3, 1, 3]) == ["", "", "", "", "", "skip", "skip", "", ""]


def test_an_incident_is_logged_once() -> None:
    assert actions(ratio_guard("log", steps=2), [3, 3, 3, 3, 1, 3, 3]) == ["", "log", "", "", "", "", "log"]
    guard = new_guard(non_finite="log")
    incidents = [observe(guard, loss) for loss in (1.0, math.nan, math.inf, 1.0, math.nan)]
    assert [incident is not None for incident in incidents] == [False, True, False, False, True]


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_not_finite_acts_at_once(action: str) -> None:
    for loss, norm, reason in ((math.nan, 1.0, "loss"), (math.inf, math.inf, "loss"), (1.0, math.nan, "gradient")):
        guard = new_guard(non_finite=action, loss_ratio={"above": 2.0, "steps": 5, "action": "log"})
        incident = observe(guard, loss, norm)
        assert incident is not None
        assert (incident.action, incident.reason, incident.steps) == (action, reason, 1)
    # An overflow of fp16 has no known norm.
    assert observe(new_guard(non_finite=action), 1.0, None) is None


def test_a_guard_that_is_off_sees_nothing() -> None:
    assert observe(ratio_guard("stop"), 1.0, math.nan) is None
    assert observe(new_guard(non_finite="stop"), 50.0) is None
    assert not config().are_on
    assert config(non_finite="log").are_on
    # Without a guard of its own, a NaN is a ratio above every threshold.
    assert actions(ratio_guard("skip"), [math.inf]) == ["skip"]


def test_skipping_has_an_end() -> None:
    guard = ratio_guard("skip", max_skips=2)
    assert actions(guard, [3, 3, 1, 3, 3, 3]) == ["skip", "skip", "", "skip", "skip", "stop"]


def test_rolling_back_has_an_end_and_saves_nothing() -> None:
    guard, ends = ratio_guard("rollback", max_rollbacks=2), []
    for _ in range(3):
        incident = observe(guard, 3.0)
        assert incident is not None
        ends.append((incident.action, incident.saves))
        guard.roll_back()
    assert ends == [("rollback", True), ("rollback", True), ("stop", False)]


@settings(deadline=None)
@given(
    ratios=st.lists(st.sampled_from([1.0, 3.0, math.inf]), max_size=30),
    cut=st.integers(0, 30),
    action=st.sampled_from(ACTIONS),
    steps=st.integers(1, 3),
)
def test_a_restored_guard_decides_as_one_that_went_on(ratios: list[float], cut: int, action: str, steps: int) -> None:
    def steps_of(guard: Guard, part: list[float]) -> list[Incident | None]:
        incidents = []
        for ratio in part:
            incidents.append(observe(guard, ratio))
            if incidents[-1] is not None and incidents[-1].action == "rollback":
                guard.roll_back()
        return incidents

    def new() -> Guard:
        return ratio_guard(action, steps=steps, non_finite="skip", max_skips=2, max_rollbacks=2)

    whole, first, second = new(), new(), new()
    expected = steps_of(whole, ratios)
    found = steps_of(first, ratios[:cut])
    second.load_state_dict(first.state_dict())
    assert found + steps_of(second, ratios[cut:]) == expected


def test_it_advances_the_runs_loss_ratio_and_remembers_rollbacks() -> None:
    ratio = LossRatio()
    guard = Guard(config(loss_ratio={"above": 2.0, "action": "rollback"}), ratio)
    for loss in (4.0, 2.0):
        assert guard.admits(loss=loss, grad_norm=1.0)
    saved, saved_ratio = guard.state_dict(), ratio.state_dict()
    assert not guard.admits(loss=5.0, grad_norm=1.0)
    assert guard.ratio == guard.incident.value == 2.5  # type: ignore[union-attr]
    assert ratio.steps == 3
    guard.roll_back()
    ratio.load_state_dict(saved_ratio)
    assert guard.incident is None
    assert guard.state_dict() == saved | {"rollbacks": 1}
    assert guard.admits(loss=3.9, grad_norm=1.0)
    assert not guard.admits(loss=4.1, grad_norm=1.0)


def test_messages_and_events() -> None:
    incident = Incident("stop", "loss_ratio", 3.25, 2)
    assert incident.why == "loss ratio 3.25 after 2 steps in a row above guards.loss_ratio.above"
    assert incident.details() == {"action": "stop", "reason": "loss_ratio", "value": 3.25, "steps": 2}
    assert Incident("skip", "gradient", math.inf, 1).why == "the gradient is not finite"
