"""The decisions of the guards, step by step."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.guards import GuardsConfig
from megatron_ext.stability.guard import Guard, UpdateGuard, Verdict
from megatron_ext.stability.loss_ratio import LossRatio

ACTIONS = ("log", "stop", "skip", "rollback")


def config(**values: Any) -> GuardsConfig:
    return GuardsConfig.model_validate_json(json.dumps(values))


def ratio_guard(action: str, *, steps: int = 1, **values: Any) -> Guard:
    return Guard(config(loss_ratio={"above": 2.0, "steps": steps, "action": action}, **values))


def actions(guard: Guard, ratios: list[float]) -> list[str]:
    verdicts = [guard.observe(loss=1.0, ratio=ratio, grad_norm=1.0) for ratio in ratios]
    return ["" if verdict is None else verdict.action for verdict in verdicts]


def test_the_ratio_has_to_stay_high() -> None:
    guard = ratio_guard("skip", steps=3)
    assert actions(guard, [3, 3, 2.0, 3, 3, 3, 3, 1, 3]) == ["", "", "", "", "", "skip", "skip", "", ""]


def test_an_incident_is_logged_once() -> None:
    assert actions(ratio_guard("log", steps=2), [3, 3, 3, 3, 1, 3, 3]) == ["", "log", "", "", "", "", "log"]
    guard = Guard(config(non_finite="log"))
    verdicts = [guard.observe(loss=loss, ratio=1.0, grad_norm=1.0) for loss in (1.0, math.nan, math.inf, 1.0, math.nan)]
    assert [verdict is not None for verdict in verdicts] == [False, True, False, False, True]


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_not_finite_acts_at_once(action: str) -> None:
    for loss, norm, reason in ((math.nan, 1.0, "loss"), (math.inf, math.inf, "loss"), (1.0, math.nan, "gradient")):
        guard = Guard(config(non_finite=action, loss_ratio={"above": 2.0, "steps": 5, "action": "log"}))
        verdict = guard.observe(loss=loss, ratio=1.0, grad_norm=norm)
        assert verdict is not None
        assert (verdict.action, verdict.reason, verdict.steps) == (action, reason, 1)
    # An overflow of fp16 has no known norm.
    assert Guard(config(non_finite=action)).observe(loss=1.0, ratio=1.0, grad_norm=None) is None


def test_a_guard_that_is_off_sees_nothing() -> None:
    assert ratio_guard("stop").observe(loss=1.0, ratio=1.0, grad_norm=math.nan) is None
    assert Guard(config(non_finite="stop")).observe(loss=1.0, ratio=50.0, grad_norm=1.0) is None
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
        verdict = guard.observe(loss=9.0, ratio=3.0, grad_norm=1.0)
        assert verdict is not None
        ends.append((verdict.action, verdict.saves))
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
    def steps_of(guard: Guard, part: list[float]) -> list[Verdict | None]:
        verdicts = []
        for ratio in part:
            loss = math.inf if math.isinf(ratio) else 1.0
            verdicts.append(guard.observe(loss=loss, ratio=ratio, grad_norm=1.0))
            if verdicts[-1] is not None and verdicts[-1].action == "rollback":
                guard.roll_back()
        return verdicts

    def new() -> Guard:
        return ratio_guard(action, steps=steps, non_finite="skip", max_skips=2, max_rollbacks=2)

    whole, first, second = new(), new(), new()
    expected = steps_of(whole, ratios)
    found = steps_of(first, ratios[:cut])
    second.load_state_dict(first.state_dict())
    assert found + steps_of(second, ratios[cut:]) == expected


def test_as_a_judge_it_computes_the_ratio_and_remembers_rollbacks() -> None:
    guard, ratio = UpdateGuard(config(loss_ratio={"above": 2.0, "action": "rollback"})), LossRatio()
    for loss in (4.0, 2.0):
        ratio.update(loss)
        assert guard.admits(loss=loss, grad_norm=1.0)
    saved, saved_ratio = guard.state_dict(), ratio.state_dict()
    assert not guard.admits(loss=5.0, grad_norm=1.0)
    assert guard.verdict is not None
    assert guard.verdict.value == 2.5
    guard.roll_back(saved, saved_ratio)
    assert guard.verdict is None
    assert guard.state_dict() == saved | {"rollbacks": 1}
    assert guard.admits(loss=3.9, grad_norm=1.0)
    assert not guard.admits(loss=4.1, grad_norm=1.0)


def test_messages_and_events() -> None:
    verdict = Verdict("stop", "loss_ratio", 3.25, 2)
    assert verdict.why == "loss ratio 3.25 after 2 steps in a row above guards.loss_ratio.above"
    assert verdict.details() == {"action": "stop", "reason": "loss_ratio", "value": 3.25, "steps": 2}
    assert Verdict("skip", "gradient", math.inf, 1).why == "the gradient is not finite"
