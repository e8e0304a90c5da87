"""TrainingPlan against a walk over every step, and its laws."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.base import Duration
from megatron_ext.curriculum.pacings import LinearPacing, RootPacing
from megatron_ext.curriculum.plan import PlanArrays, TrainingPlan
from megatron_ext.errors import UserError
from tests.curriculum.runs import Case, cases, property_test, run_config


@property_test
@given(cases())
def test_every_step_is_what_the_formulas_give_when_walked_one_by_one(case: Case) -> None:
    plan = case.config.plan()
    assert plan.steps == len(case.steps)
    assert plan.tokens == case.tokens
    samples = 0
    for number, (walked, planned) in enumerate(zip(case.steps, plan, strict=True)):
        assert planned.step == number
        assert (planned.batch_size, planned.seq_len) == (walked.batch_size, walked.seq_len)
        assert planned.tokens == walked.batch_size * walked.seq_len
        assert planned.consumed_tokens == walked.consumed_tokens
        assert planned.consumed_samples == samples
        samples += walked.batch_size
    assert plan.samples == samples
    assert 0 <= plan.overshoot < plan[plan.steps - 1].tokens
    assert plan.tokens == (plan.duration.tokens or plan.tokens) + plan.overshoot


@property_test
@given(cases(mixed=False))
def test_lengths_and_batches_rise_and_the_last_step_is_full(case: Case) -> None:
    rows = case.config.plan().arrays()
    assert (np.diff(rows.seq_len) >= 0).all()
    assert (np.diff(rows.batch_size) >= 0).all()
    curriculum = case.config.curriculum
    if isinstance(curriculum, LinearPacing | RootPacing):
        assert rows.seq_len[0] == curriculum.start
        assert rows.seq_len[-1] == curriculum.end
        assert (rows.seq_len % curriculum.multiple == 0).all()
    else:
        assert rows.seq_len[-1] == case.config.training.seq_len
    assert rows.batch_size[-1] == case.config.training.batch_size


@property_test
@given(cases())
def test_random_access_iteration_and_arrays_agree_exactly(case: Case) -> None:
    plan = case.config.plan()
    rows = plan.arrays()
    steps = list(plan)
    for name in PlanArrays.__dataclass_fields__:
        assert getattr(rows, name).tolist() == [getattr(step, name) for step in steps], name
    assert rows.tokens.sum() == plan.tokens
    assert plan.batch_sizes == sorted(set(rows.batch_size.tolist()))
    assert [plan[t] for t in reversed(range(plan.steps))] == steps[::-1]
    assert sum(segment.steps * segment.step_tokens for segment in plan.segments) == plan.tokens
    assert sum(segment.steps * segment.batch_size for segment in plan.segments) == plan.samples


@property_test
@given(cases(mixed=False))
def test_segments_tile_the_run_and_neighbors_differ(case: Case) -> None:
    segments = case.config.plan().segments
    assert (segments[0].first_step, segments[0].first_tokens, segments[0].first_samples) == (0, 0, 0)
    for left, right in itertools.pairwise(segments):
        assert left.steps >= 1
        assert (right.first_step, right.first_tokens) == (left.end_step, left.end_tokens)
        assert (left.batch_size, left.seq_len) != (right.batch_size, right.seq_len)


@property_test
@given(cases(), st.data())
def test_step_at_tokens_inverts_consumed_tokens(case: Case, data: st.DataObject) -> None:
    plan = case.config.plan()
    for step in plan:
        assert plan.step_at_tokens(step.consumed_tokens) == step.step
        assert plan.tokens_at_step(step.step) == step.consumed_tokens
    assert plan.step_at_tokens(plan.tokens) == plan.steps
    tokens = data.draw(st.integers(1, plan.tokens))
    reached = plan.step_at_tokens(tokens)
    assert plan.tokens_at_step(reached - 1) < tokens <= plan.tokens_at_step(reached)
    assert plan.steps_within(Duration(tokens=tokens)) == plan.steps_within(Duration(steps=reached)) == reached
    for longer in (None, Duration(tokens=2 * plan.tokens), Duration(steps=plan.steps + 1)):
        assert plan.steps_within(longer) == plan.steps


@property_test
@given(cases())
def test_the_learning_rate_is_continuous_and_ends_at_its_minimum(case: Case) -> None:
    plan = case.config.plan()
    rates, rows = case.config.learning_rate, plan.arrays()
    schedule = plan.learning_rate
    warm = (rows.consumed_tokens + rows.tokens if schedule.warmup_in_tokens else rows.step + 1) < schedule.warmup
    assert (rows.lr > 0).all() or rates.min == 0
    assert (rows.lr <= rates.peak).all()
    assert (rows.lr[~warm] >= rates.min).all()
    warmup_slope = rates.peak / schedule.warmup if schedule.warmup else 0.0
    progress = rows.tokens[1:] if schedule.warmup_in_tokens else 1
    decay_slope = math.pi / 2 * (rates.peak - rates.min) / (schedule.decay_until - schedule.decay_from or 1)
    jump = np.abs(np.diff(rows.lr))
    limit = np.where(warm[:-1], warmup_slope * progress, decay_slope * rows.tokens[1:])
    assert (jump <= limit * (1 + 1e-9) + 1e-15).all()
    if schedule.warmup:
        assert rows.lr[int(warm.sum())] == rates.peak
        assert (np.diff(rows.lr[: int(warm.sum()) + 1]) > 0).all()
    assert (np.diff(rows.lr[int(warm.sum()) :]) <= 0).all()
    if rates.decay != "constant":
        after = rows.consumed_tokens + rows.tokens >= schedule.decay_until
        assert (rows.lr[after] == rates.min).all()
        assert after[-1] or rates.decay_duration is not None


def test_the_1_5b_recipe_matches_its_published_arithmetic() -> None:
    config = run_config(
        seq_len=1024,
        batch_size=4096,
        duration={"tokens": 157_286_400_000},
        curriculum={"pacing": "linear", "start": 64, "duration": {"steps": 45_000}},
        learning_rate={"peak": 6e-4, "min": 1e-5, "warmup": {"steps": 3000}},
    )
    plan = config.plan()
    assert plan[45_000].consumed_tokens == 99_532_800_000  # about 99.5B tokens in the warmup
    assert plan.steps == 58_770
    assert len(plan.segments) == 121
    assert plan[2999].lr == 6e-4
    assert plan[plan.steps - 1].lr == 1e-5


def test_gpt3_batch_size_warmup_adds_equal_increments_over_its_tokens() -> None:
    warmup = {"start": 16, "increment": 16, "duration": {"tokens": 4_000_000_000}}
    config = run_config(
        seq_len=2048,
        batch_size=256,
        duration={"tokens": 300_000_000_000},
        learning_rate={"peak": 6e-4, "warmup": {"tokens": 375_000_000}, "decay_duration": {"tokens": 260_000_000_000}},
        training={"batch_size_warmup": warmup},
    )
    plan = config.plan()
    assert [segment.batch_size for segment in plan.segments] == list(range(16, 257, 16))
    for number, segment in enumerate(plan.segments):
        before = plan.tokens_at_step(max(segment.first_step - 1, 0))
        assert before <= 4_000_000_000 * number / 15 <= segment.first_tokens
    assert plan[plan.step_at_tokens(260_000_000_000)].lr == 0.0


def test_durations_in_steps_are_the_same_decay_as_their_tokens() -> None:
    curriculum = {"pacing": "linear", "start": 8, "duration": {"steps": 30}}

    def plan(**rates: object) -> TrainingPlan:
        learning_rate = {"peak": 1.0, "min": 0.1, "warmup": {"steps": 5}, **rates}
        duration = {"steps": 60}
        return run_config(
            seq_len=64, batch_size=2, duration=duration, curriculum=curriculum, learning_rate=learning_rate
        ).plan()

    tokens_50 = plan().tokens_at_step(50)
    assert plan(decay_duration={"steps": 50}) == plan(decay_duration={"tokens": tokens_50})
    assert plan(decay_duration={"steps": 60}) == plan()
    cooled = plan(decay="wsd", decay_duration={"steps": 50}, cooldown={"steps": 20}).arrays().lr
    assert (cooled[4:30] == 1.0).all()
    assert 0.1 < cooled[30] < 1.0
    assert (cooled[49:] == 0.1).all()
    assert cooled[48] > 0.1


def test_outside_the_plan_is_an_index_error() -> None:
    plan = run_config(seq_len=8, batch_size=2, duration={"steps": 3}).plan()
    for step in (-1, 3):
        with pytest.raises(IndexError, match=r"\[0, 3\)"):
            plan[step]
    for tokens in (-1, 49):
        with pytest.raises(ValueError, match="outside"):
            plan.step_at_tokens(tokens)
    with pytest.raises(ValueError, match="outside"):
        plan.tokens_at_step(4)
    assert plan[np.int64(2)].step == 2  # type: ignore[index]


SLW = {"pacing": "linear", "start": 8, "duration": {"steps": 100}}
WARMUP = {"start": 1, "increment": 1, "duration": {"tokens": 10_000}}


def rated(duration: dict[str, int], **rate: object) -> dict[str, object]:
    return {"duration": duration, "learning_rate": {"peak": 1.0, **rate}}


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (
            {"duration": {"tokens": 1000}, "curriculum": SLW},
            ["curriculum", "64", "step 100", "training.duration", "1,000 tokens", "steps (1,0"],
        ),
        (
            {"duration": {"steps": 3}, "training": {"batch_size_warmup": WARMUP}},
            ["training.batch_size_warmup", "batch_size 2", "10,048 tokens", "training.duration 3 steps"],
        ),
        (
            rated({"tokens": 1000}, warmup={"steps": 9}),
            ["learning_rate.warmup", "9 steps", "training.duration 1,000 tokens", "8 steps"],
        ),
        (
            rated({"steps": 10}, warmup={"steps": 5}, decay_duration={"tokens": 600}),
            ["learning_rate.warmup", "5 steps", "640 tokens", "600 tokens", "learning_rate.decay_duration"],
        ),
        (
            rated({"tokens": 1200}, warmup={"steps": 10}),
            ["learning_rate.warmup", "1,280 tokens", "training.duration 1,200 tokens"],
        ),
        (
            rated({"steps": 10}, warmup={"steps": 5}, decay="wsd", cooldown={"tokens": 641}),
            ["learning_rate.cooldown", "641 tokens", "639 tokens", "1,280 tokens", "640 tokens"],
        ),
        (rated({"tokens": 1280}, decay="wsd", cooldown={"steps": 11}), ["learning_rate.cooldown", "11 steps"]),
    ],
)
def test_contradictions_between_units_are_named_with_their_numbers(run: dict[str, object], words: list[str]) -> None:
    config = run_config(seq_len=64, batch_size=2, **run)  # type: ignore[arg-type]
    with pytest.raises(UserError) as raised:
        config.plan()
    for word in words:
        assert word in str(raised.value)


def test_plan_json_holds_segments_and_totals() -> None:
    curriculum = {"pacing": "linear", "start": 8, "duration": {"steps": 100_000}}
    plan = run_config(seq_len=64, batch_size=2, duration={"tokens": 20_000_001}, curriculum=curriculum).plan()
    text = json.dumps(plan.to_json())
    assert len(text) < 5000
    content = json.loads(text)
    assert content["steps"] == plan.steps
    assert content["tokens"] == plan.tokens == 20_000_001 + content["overshoot_tokens"]
    assert content["segments"][-1]["seq_len"] == 64
    assert sum(segment["steps"] for segment in content["segments"]) == plan.steps
