"""Laws of adaptive pacing over random runs, and what it does on planted loss curves."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import PlannedStep, Schedule
from megatron_ext.curriculum.sampler import batch_slices
from megatron_ext.errors import UserError
from tests.curriculum.runs import (
    Losses,
    adaptive,
    adaptive_config,
    adaptive_configs,
    adaptive_walk,
    formula_value,
    noise,
    run_config,
    whole,
)

property_test = settings(deadline=None, max_examples=40)


def bound(config: RunConfig, which: str, step: PlannedStep) -> int:
    """A bounding plan's length at a point of the run, by the formula."""
    pacing = json.loads(config.curriculum.model_dump_json())
    duration = pacing[which]
    progress = step.consumed_tokens if duration["tokens"] else step.step
    return formula_value(
        pacing | {"duration": duration}, end=pacing["end"] or config.training.seq_len, progress=progress
    )


@property_test
@given(adaptive_configs(), st.integers(0, 1000))
def test_never_outside_the_bounds_and_the_run_ends_within_theirs(config: RunConfig, seed: int) -> None:
    bounds = config.possible_plans()
    done = whole(adaptive(config), noise(seed))
    multiple, start = config.curriculum.step_between_lengths, done.steps[0].seq_len
    for step in done.steps:
        assert bound(config, "slowest", step) <= step.seq_len <= bound(config, "fastest", step)
        assert (step.seq_len - start) % multiple == 0
    assert done.steps[0].seq_len == start
    assert bounds["fastest"].steps <= len(done.steps) <= bounds["slowest"].steps
    last = done.steps[-1]
    tokens, budget = last.consumed_tokens + last.tokens, config.training.duration
    if budget.tokens is not None:
        assert last.consumed_tokens < budget.tokens <= tokens
    else:
        assert len(done.steps) == budget.steps


@property_test
@given(adaptive_configs(), st.integers(0, 1000))
def test_the_dataset_never_runs_out(config: RunConfig, seed: int) -> None:
    schedule = adaptive(config)
    samples, tail = schedule.plan.samples, config.data.tail
    for step in whole(schedule, noise(seed)).steps:
        slices = batch_slices(step, seq_len=config.training.seq_len, tail=tail)
        assert max(slices.samples.max(), slices.next_samples.max()) < samples
    assert schedule.plan.samples == samples


@property_test
@given(adaptive_configs(), st.integers(0, 1000))
def test_a_decision_changes_no_step_that_is_done(config: RunConfig, seed: int) -> None:
    schedule = adaptive(config)
    for done in adaptive_walk(schedule, noise(seed)):
        number = len(done.steps)
        assert [schedule.plan[t] for t in range(max(0, number - 3), number)] == done.steps[-3:]
    # The steps as they were planned when they were taken are the final plan: lengths, counts and learning rates.
    assert list(schedule.plan) == done.steps
    totals = [step.consumed_tokens for step in done.steps]
    assert totals == [sum(step.tokens for step in done.steps[:t]) for t in range(len(done.steps))]


@property_test
@given(adaptive_configs(), st.integers(0, 1000), st.data())
def test_a_state_restored_anywhere_has_the_same_future(config: RunConfig, seed: int, data: st.DataObject) -> None:
    reference = whole(adaptive(config), noise(seed))
    stop = data.draw(st.integers(1, len(reference.steps)))
    first = adaptive(config)
    walked = adaptive_walk(first, noise(seed))
    for _ in range(stop):
        next(walked)
    state = json.loads(json.dumps(first.state_dict()))
    second = adaptive(config)
    second.load_state_dict(state)
    assert second.plan == first.plan
    assert second.state_dict() == first.state_dict()
    if stop < len(reference.steps):
        rest = whole(second, noise(seed), first=stop)
        assert rest.steps == reference.steps[stop:]
        assert rest.decisions == reference.decisions[len(reference.decisions) - len(rest.decisions) :]


@property_test
@given(adaptive_configs(), st.integers(0, 1000))
def test_a_process_that_only_follows_has_the_same_plan(config: RunConfig, seed: int) -> None:
    leader, follower = adaptive(config), adaptive(config)
    for decision in whole(leader, noise(seed)).decisions:
        follower.apply(decision)
    assert follower.plan == leader.plan


def test_calm_losses_follow_the_fastest_plan() -> None:
    config = adaptive_config()
    decisions = whole(adaptive(config), lambda step: 5.0 - 0.001 * step.step).decisions
    assert {decision.action for decision in decisions} == {"grow"}
    fastest = config.possible_plans()["fastest"]
    assert all(decision.seq_len == fastest[decision.step].seq_len for decision in decisions)


def test_losses_that_never_calm_down_follow_the_slowest_plan() -> None:
    config = adaptive_config()
    schedule = adaptive(config)
    done = whole(schedule, lambda step: 2.0 if step.step < 3 else 6.0 + 0.01 * step.step)
    assert done.steps == list(config.possible_plans()["slowest"])
    assert {decision.action for decision in done.decisions} == {"back"}


def test_noise_between_the_thresholds_holds() -> None:
    config = adaptive_config()
    # The median of three swings by a quarter, in pairs of steps.
    decisions = whole(adaptive(config), lambda step: 4.0 if step.step % 6 < 3 else 5.0).decisions
    assert {decision.action for decision in decisions[1:]} == {"hold"}
    assert decisions[-1].reason.startswith("loss ratio 1.25 above hold_above 1.1")


@pytest.mark.parametrize("bad", [50.0, math.nan, math.inf])
def test_single_bad_batches_decide_nothing(bad: float) -> None:
    def losses(step: PlannedStep) -> float:
        return bad if step.step % 3 == 0 else 4.0 - 0.001 * step.step

    decisions = whole(adaptive(adaptive_config()), losses).decisions
    assert {decision.action for decision in decisions} == {"grow"}


def spike(at: int, height: float, steps: int = 10) -> Losses:
    """Falling losses (higher at shorter lengths) with a spike that decays over ``steps`` steps."""

    def loss(step: PlannedStep) -> float:
        base = 6.0 - 0.01 * step.step - 0.02 * step.seq_len
        since = step.step - at
        return base * (1 + (height - 1) * (1 - since / steps)) if 0 <= since < steps else base

    return loss


def test_a_spike_steps_back_then_holds_while_it_falls_then_grows() -> None:
    config = adaptive_config(fastest={"steps": 100}, slowest={"steps": 400}, duration={"tokens": 400 * 4 * 64})
    decisions = whole(adaptive(config), spike(at=52, height=2.0)).decisions
    by_step = {decision.step: decision for decision in decisions}
    assert by_step[50].action == "grow"
    assert by_step[55].action == "back"
    assert by_step[55].seq_len < by_step[50].seq_len
    assert [by_step[step].action for step in (60, 65)] == ["hold", "hold"]
    assert all(decision.action == "grow" for decision in decisions if decision.step > 65)
    # It catches up with the fastest plan.
    assert by_step[100].seq_len == config.possible_plans()["fastest"][100].seq_len


def test_a_loss_that_is_not_finite_for_good_steps_back_each_time() -> None:
    config = adaptive_config(fastest={"steps": 100}, slowest={"steps": 400}, duration={"tokens": 400 * 4 * 64})
    decisions = whole(adaptive(config), lambda step: 4.0 if step.step < 50 else math.nan).decisions
    after = [decision for decision in decisions if decision.step > 50]
    assert {decision.action for decision in after} == {"back"}
    assert math.isinf(after[0].loss_ratio or 0)


def test_a_shorter_length_is_compared_with_losses_of_its_own() -> None:
    """Losses that differ by length alone, in a ratio above back_above, are calm whatever the order of lengths."""
    config = adaptive_config(fastest={"steps": 100}, slowest={"steps": 400}, duration={"tokens": 400 * 4 * 64})

    def losses(step: PlannedStep) -> float:
        context = 9.0 if step.seq_len <= 32 else 3.0
        return 4 * context if 70 <= step.step < 73 else context  # long enough to step back over the border

    decisions = whole(adaptive(config), losses).decisions
    back = [decision for decision in decisions if decision.action == "back"]
    assert [decision.step for decision in back] == [75]
    assert back[0].previous > 32 >= back[0].seq_len
    assert next(decision for decision in decisions if decision.step == 80).action == "grow"


def test_variance_above_its_median_holds() -> None:
    def variance(step: PlannedStep) -> float:
        return 5.0 if step.step == 32 else 1.0

    for factor, action in ((0, "grow"), (4, "hold"), (6, "grow")):
        config = adaptive_config(variance_above=factor)
        decisions = whole(adaptive(config), lambda _: 4.0, variance=variance).decisions
        by_step = {decision.step: decision for decision in decisions}
        assert by_step[35].action == action
        assert by_step[35].variance_ratio == 5.0
        assert {by_step[30].action, by_step[40].action} == {"grow"}


def test_default_growth_is_twice_what_the_fastest_plan_adds() -> None:
    # 7 multiples in 40 steps are 0.875 in an interval of 5.
    assert adaptive(adaptive_config())._growth == 2
    assert (
        adaptive(adaptive_config(fastest={"steps": 4000}, slowest={"steps": 4000}, duration={"steps": 9000}))._growth
        == 1
    )
    assert adaptive(adaptive_config(growth=5))._back == 5


def test_no_decision_after_the_slowest_plan_has_ended() -> None:
    decisions = whole(adaptive(adaptive_config()), lambda _: 4.0).decisions
    assert [decision.step for decision in decisions] == list(range(5, 160, 5))


def test_before_any_decision_the_plan_is_the_slowest_and_a_fixed_one_has_no_state() -> None:
    config = adaptive_config()
    plan = config.plan()
    assert list(plan) == list(config.possible_plans()["slowest"])
    written = config.schedule().to_json()
    assert written["bounds"] == {which: bound.to_json() for which, bound in config.possible_plans().items()}
    assert written["steps"] == written["bounds"]["slowest"]["steps"] > written["bounds"]["fastest"]["steps"]
    fixed = run_config(seq_len=8, batch_size=2, duration={"steps": 3}).schedule()
    assert type(fixed) is Schedule
    fixed.observe(seq_len=8, loss=1.0)
    assert not any(map(fixed.due, fixed.plan))
    assert fixed.state_dict() == {}
    fixed.load_state_dict({})
    with pytest.raises(UserError, match="lengths"):
        fixed.load_state_dict({"lengths": []})


@pytest.mark.parametrize("part", ["lengths", "watch", "last_ratio", "lowest"])
def test_a_state_of_another_version_is_refused(part: str) -> None:
    schedule = adaptive(adaptive_config())
    state: dict[str, Any] = schedule.state_dict()
    del (state["watch"] if part == "lowest" else state)[part]
    with pytest.raises(UserError, match=part):
        schedule.load_state_dict(state)


def test_bounds_that_do_not_end_within_the_run_are_named() -> None:
    config = adaptive_config(duration={"tokens": 30000}, slowest={"steps": 1000})
    with pytest.raises(UserError, match=r"curriculum\.slowest: .*reaches seq_len 64 at step 1000"):
        config.schedule()
