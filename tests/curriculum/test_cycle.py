"""Mixed lengths against a walk over every step, and the laws of a plan."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.curriculum import MixedPacing
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.cycle import CycleSegments, cycle_of
from megatron_ext.curriculum.plan import PlanArrays, TrainingPlan
from megatron_ext.curriculum.sampler import SamplePlan
from tests.curriculum.runs import property_test, run_config
from tests.curriculum.test_sampler import tokens_read


@st.composite
def mixed_runs(draw: st.DrawFn, tail: str | None = None) -> RunConfig:
    """Runs of up to a few cycles, by steps or by tokens."""
    multiple = draw(st.sampled_from([1, 3, 8]))
    lengths = sorted(multiple * n for n in draw(st.lists(st.integers(1, 12), min_size=2, max_size=4, unique=True)))
    batch_size = draw(st.integers(1, 5))
    most = batch_size * lengths[-1] * 40
    duration = draw(
        st.one_of(st.integers(1, 60).map(lambda n: {"steps": n}), st.integers(1, most).map(lambda n: {"tokens": n}))
    )
    return run_config(
        seq_len=lengths[-1],
        batch_size=batch_size,
        duration=duration,
        curriculum={
            "pacing": "mixed",
            "lengths": lengths,
            "multiple": multiple,
            "per_cycle": draw(st.integers(1, 4)),
        },
        seed=draw(st.integers(0, 2**31 - 1)),  # type: ignore[arg-type]
        data={"tail": tail or draw(st.sampled_from(["truncate", "recycle"]))},
    )


def cycle(config: RunConfig) -> tuple[int, ...]:
    assert isinstance(config.curriculum, MixedPacing)
    return cycle_of(config.curriculum, config.seed)


@property_test
@given(mixed_runs())
def test_every_step_is_what_a_walk_gives(config: RunConfig) -> None:
    plan = TrainingPlan.from_config(config)
    lengths, tokens = itertools.cycle(cycle(config)), 0
    for planned in plan:
        length = next(lengths)
        assert (planned.batch_size, planned.seq_len) == (config.training.batch_size, length)
        assert planned.tokens == config.training.batch_size * length
        assert planned.consumed_tokens == tokens
        tokens += planned.tokens
    assert plan.tokens == tokens
    assert plan.batch_sizes == [config.training.batch_size]
    duration = config.training.duration
    assert plan.steps == (duration.steps or plan.steps)
    assert 0 <= plan.overshoot < plan[plan.steps - 1].tokens
    assert duration.tokens is None or plan.tokens - plan.overshoot == duration.tokens


@property_test
@given(mixed_runs())
def test_a_cycle_holds_every_length_equally_often(config: RunConfig) -> None:
    assert isinstance(config.curriculum, MixedPacing)
    counts = Counter(cycle(config))
    assert set(counts) == set(config.curriculum.lengths)
    assert set(counts.values()) == {config.curriculum.per_cycle}


@property_test
@given(mixed_runs())
def test_random_access_arrays_and_segments_agree_exactly(config: RunConfig) -> None:
    plan = TrainingPlan.from_config(config)
    rows, steps = plan.arrays(), list(plan)
    for name in PlanArrays.__dataclass_fields__:
        assert getattr(rows, name).tolist() == [getattr(step, name) for step in steps], name
    assert [plan[t] for t in reversed(range(plan.steps))] == steps[::-1]
    assert len(plan.segments) == plan.steps
    for segment, step in zip(plan.segments, steps, strict=True):
        assert (segment.first_step, segment.steps, segment.step_tokens) == (step.step, 1, step.tokens)
        assert (segment.first_tokens, segment.first_samples) == (step.consumed_tokens, step.consumed_samples)
    assert plan.segments[:2] == tuple(plan.segments)[:2]
    with pytest.raises(IndexError):
        plan.segments[plan.steps]


@property_test
@given(mixed_runs(), st.data())
def test_step_at_tokens_inverts_consumed_tokens(config: RunConfig, data: st.DataObject) -> None:
    plan = TrainingPlan.from_config(config)
    for step in plan:
        assert plan.step_at_tokens(step.consumed_tokens) == step.step
        assert plan.tokens_at_step(step.step) == step.consumed_tokens
    assert plan.step_at_tokens(plan.tokens) == plan.steps
    tokens = data.draw(st.integers(1, plan.tokens))
    reached = plan.step_at_tokens(tokens)
    assert plan.tokens_at_step(reached - 1) < tokens <= plan.tokens_at_step(reached)


@property_test
@given(mixed_runs(tail="truncate"))
def test_truncate_draws_every_sample_once(config: RunConfig) -> None:
    plan = TrainingPlan.from_config(config)
    batches = [SamplePlan(plan).slices(step) for step in range(plan.steps)]
    assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(plan.samples))


@property_test
@given(mixed_runs(tail="recycle"))
def test_recycle_reads_every_token_of_the_stream_once(config: RunConfig) -> None:
    plan = TrainingPlan.from_config(config)
    used: Counter[tuple[int, int]] = Counter()
    for step in plan:
        opened = {sample for sample, _ in used}
        assert step.consumed_samples == len(opened)
        used.update(itertools.chain(*tokens_read(SamplePlan(plan).slices(step.step), plan.seq_len)))
    assert set(used.values()) == {1}
    assert used.total() == plan.tokens
    assert plan.samples == len({sample for sample, _ in used})


def test_the_order_is_the_seeds_and_stays_what_it_is() -> None:
    curriculum = MixedPacing(pacing="mixed", lengths=(8, 16, 32), per_cycle=2)
    orders = {seed: cycle_of(curriculum, seed) for seed in range(50)}
    assert len(set(orders.values())) > 30
    # A resumed run must find the order of the run that it goes on with, under any version.
    assert orders[0] == (32, 8, 16, 16, 32, 8)


def test_a_run_of_any_length_costs_one_cycle() -> None:
    config = run_config(
        seq_len=1024,
        batch_size=512,
        duration={"tokens": 157_286_400_000_000},
        curriculum={"pacing": "mixed", "lengths": [128, 512, 1024]},
        learning_rate={"peak": 1e-3, "warmup": {"tokens": 10**9}},
    )
    plan = TrainingPlan.from_config(config)
    assert plan.steps > 5 * 10**8
    assert plan.step_at_tokens(plan[plan.steps // 3].consumed_tokens) == plan.steps // 3
    assert isinstance(plan.segments, CycleSegments)
    assert len(json.dumps(plan.to_json())) < 2000
