"""Levels against the formula evaluated at every step; the registry, descriptions, and mixed lengths.

The laws that every pacing's plan keeps are in test_plan.py.
"""

import json
from collections import Counter
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.curriculum import (
    PACINGS,
    AdaptivePacing,
    ConstantPacing,
    DiscretePacing,
    Duration,
    LinearPacing,
    MixedPacing,
    Pacing,
    RootPacing,
    RunSpec,
    Stage,
    TrainingPlan,
    UserError,
    open_schedule,
)
from megatron_ext.curriculum.segments import (
    CycleSegments,
    Levels,
    constant,
    cut,
    discrete,
    phases_of,
    rising,
    steps_to_reach,
    tokens_after,
)
from tests.curriculum.runs import formula_value, property_test, run_config


def value_at(levels: Levels, progress: int) -> int:
    return [level.value for level in levels if level.begins <= progress][-1]


@property_test
@given(
    start=st.integers(1, 9),
    jumps=st.integers(0, 40),
    multiple=st.sampled_from([1, 3, 8, 16]),
    total=st.integers(1, 200),
    degree=st.integers(1, 5),
)
@example(start=1, jumps=10, multiple=1, total=10, degree=1)  # floats: 10 * (3 / 10) is below 3
@example(start=8, jumps=127, multiple=8, total=7, degree=1)  # more lengths than steps
def test_rising_is_the_formula_at_every_step(start: int, jumps: int, multiple: int, total: int, degree: int) -> None:
    start *= multiple
    end = start + jumps * multiple
    levels = rising(start, end, multiple=multiple, duration=Duration(tokens=total), degree=degree)
    pacing = {"start": start, "multiple": multiple, "duration": {"tokens": total}, "degree": degree}
    for progress in range(total + 3):
        assert value_at(levels, progress) == formula_value(pacing, end=end, progress=progress)
    assert value_at(levels, total) == end
    assert jumps == 0 or value_at(levels, total - 1) < end
    assert all(level.in_tokens for level in levels)
    begins = [level.begins for level in levels]
    assert begins == sorted(set(begins))


def test_thresholds_stay_exact_where_floats_do_not() -> None:
    total = 2**53 - 1
    levels = rising(8, 1024, multiple=8, duration=Duration(steps=total), degree=3)
    assert levels[1].begins == -(-total * 8**3 // 1016**3)
    assert levels[-1].begins == total


def test_steps_and_tokens_go_on_beyond_the_end_with_the_last_batch() -> None:
    lengths = rising(8, 24, multiple=8, duration=Duration(steps=4))
    segments = cut(phases_of(lengths, constant(2)), Duration(steps=6))
    assert [(segment.first_step, segment.steps, segment.seq_len) for segment in segments] == [
        (0, 2, 8),
        (2, 2, 16),
        (4, 2, 24),
    ]
    assert tokens_after(segments, 6) == 2 * (8 + 8 + 16 + 16 + 24 + 24)
    assert tokens_after(segments, 9) == tokens_after(segments, 6) + 3 * 48
    assert steps_to_reach(segments, tokens_after(segments, 9)) == 9
    assert steps_to_reach(segments, tokens_after(segments, 9) + 1) == 10
    assert steps_to_reach(segments, 0) == 0


def test_length_and_batch_may_change_at_the_same_step_and_at_different_ones() -> None:
    lengths = rising(8, 16, multiple=8, duration=Duration(steps=3))
    batches = rising(1, 3, multiple=1, duration=Duration(tokens=40))
    phases = phases_of(lengths, batches)
    assert [(s.first_step, s.first_tokens, s.batch_size, s.seq_len) for s in phases] == [
        (0, 0, 1, 8),
        (3, 24, 2, 16),
        (4, 56, 3, 16),
    ]


OVER = Duration(steps=50)
EXAMPLES = [
    (ConstantPacing(), "none: 64 tokens from the first step on"),
    (LinearPacing(start=8, duration=OVER), "linear: 8 to 64 over 50 steps, multiples of 8"),
    (RootPacing(start=8, duration=OVER, end=32, multiple=4), "root: 8 to 32 over 50 steps, multiples of 4"),
    (
        DiscretePacing(stages=(Stage(seq_len=8, duration=Duration(steps=5)),)),
        "discrete: 8 for 5 steps, then 64",
    ),
    (MixedPacing(lengths=(8, 64)), "mixed: steps of 8, 64 tokens in a cycle that the seed shuffles"),
    (
        AdaptivePacing(start=8, fastest=Duration(steps=5), slowest=Duration(steps=9)),
        "adaptive: 8 to 64 over 5 steps at the fastest to 9 steps at the slowest, a decision every 20 steps",
    ),
]


@pytest.mark.parametrize(("pacing", "description"), EXAMPLES)
def test_a_pacing_says_in_a_line_what_it_does(pacing: Pacing, description: str) -> None:
    assert pacing.describe(64) == description
    assert PACINGS[pacing.pacing] is type(pacing)


def test_every_pacing_is_in_the_registry() -> None:
    assert list(PACINGS) == [pacing.pacing for pacing, _ in EXAMPLES]


def test_without_a_config_contradictions_are_found_too() -> None:
    run = RunSpec(seq_len=64, batch_size=2, duration=Duration(steps=40))
    with pytest.raises(UserError) as raised:
        TrainingPlan.build(LinearPacing(start=9, duration=Duration(steps=50)), run)
    assert [line.split(" is")[0] for line in str(raised.value).splitlines()] == [
        "curriculum.start",
        "curriculum.duration",
    ]


def test_a_plan_of_plain_values_is_that_of_the_config() -> None:
    config = run_config(
        seq_len=64,
        batch_size=2,
        duration={"steps": 80},
        curriculum={"pacing": "linear", "start": 8, "duration": {"steps": 50}},
        learning_rate={"peak": 1.0, "decay": "constant"},
    )
    run = RunSpec(seq_len=64, batch_size=2, duration=Duration(steps=80))
    assert TrainingPlan.build(LinearPacing(start=8, duration=OVER), run) == config.plan()


def test_a_pacing_of_ones_own_needs_its_levels_and_nothing_else() -> None:
    class Halves(Pacing):
        pacing: Literal["halves"] = "halves"

        def levels(self, seq_len: int) -> Levels:
            return discrete([(seq_len // 2, Duration(steps=3))], full=seq_len)

    run = RunSpec(seq_len=64, batch_size=2, duration=Duration(steps=5))
    assert [step.seq_len for step in open_schedule(Halves(), run).plan] == [32, 32, 32, 64, 64]


def test_a_cycle_holds_every_length_equally_often_and_is_a_sequence() -> None:
    pacing = MixedPacing(lengths=(8, 16, 64), per_cycle=3)
    assert Counter(pacing.cycle(7)) == {8: 3, 16: 3, 64: 3}
    run = RunSpec(seq_len=64, batch_size=2, duration=Duration(steps=20), seed=7)
    segments = pacing.segments(run)
    assert segments[:2] == tuple(segments)[:2]
    assert [segment.seq_len for segment in segments] == [*pacing.cycle(7) * 2, *pacing.cycle(7)[:2]]
    with pytest.raises(IndexError):
        segments[20]


def test_the_order_is_the_seeds_and_stays_what_it_is() -> None:
    curriculum = MixedPacing(pacing="mixed", lengths=(8, 16, 32), per_cycle=2)
    orders = {seed: curriculum.cycle(seed) for seed in range(50)}
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
    plan = config.plan()
    assert plan.steps > 5 * 10**8
    assert plan.step_at_tokens(plan[plan.steps // 3].consumed_tokens) == plan.steps // 3
    assert isinstance(plan.segments, CycleSegments)
    assert len(json.dumps(plan.to_json())) < 2000
