"""The registry, descriptions, and mixed lengths; the laws that every pacing's plan keeps are in test_plan.py."""

import json
from collections import Counter
from typing import Literal

import pytest

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
from megatron_ext.curriculum.segments import CycleSegments, Levels, discrete
from tests.curriculum.runs import run_config

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
