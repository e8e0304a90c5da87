"""Adaptive runs without a model: a schedule that is shown made-up losses step by step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.adaptive import AdaptiveSchedule
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.curriculum.schedule import Decision
from tests.curriculum.runs import Json, run_config

Losses = Callable[[PlannedStep], float]


def adaptive_config(
    *,
    duration: Json | None = None,
    seq_len: int = 64,
    batch_size: int = 4,
    tail: str = "truncate",
    learning_rate: Json | None = None,
    **curriculum: Any,
) -> RunConfig:
    """Length 8 to 64 within 40 (fastest) to 160 (slowest) steps, a decision every 5; a budget of 200 full steps."""
    base = {"pacing": "adaptive", "start": 8, "fastest": {"steps": 40}, "slowest": {"steps": 160}, "interval": 5}
    return run_config(
        seq_len=seq_len,
        batch_size=batch_size,
        duration=duration or {"tokens": 200 * 64 * 4},
        curriculum=base | {"smoothing": 3} | curriculum,
        learning_rate={"peak": 1e-3} | (learning_rate or {"decay": "constant"}),
        data={"tail": tail},
    )


@dataclass
class Walk:
    """What a run did."""

    steps: list[PlannedStep] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


def adaptive(config: RunConfig) -> AdaptiveSchedule:
    """The schedule of an adaptive run from its beginning."""
    schedule = config.schedule()
    assert isinstance(schedule, AdaptiveSchedule)
    return schedule


def walk(
    schedule: AdaptiveSchedule, losses: Losses, *, first: int = 0, variance: Losses | None = None
) -> Iterator[Walk]:
    """Go through a run as the training loop does, from step ``first`` on; yields the walk so far after each step."""
    done = Walk()
    step = first
    while step < schedule.plan.steps:
        planned = schedule.plan[step]
        seen = None if variance is None else variance(planned)
        schedule.observe(seq_len=planned.seq_len, loss=losses(planned), variance=seen)
        step += 1
        if schedule.due(planned):
            decision = schedule.decide(planned)
            schedule.apply(decision)
            done.decisions.append(decision)
        done.steps.append(planned)
        yield done


def whole(schedule: AdaptiveSchedule, losses: Losses, **options: Any) -> Walk:
    """The run to its end."""
    *_, done = walk(schedule, losses, **options)
    return done


@st.composite
def adaptive_configs(draw: st.DrawFn) -> RunConfig:
    """Runs of up to some hundred steps, bounds in steps or in tokens, budgets in steps or in tokens, both tails."""
    multiple = draw(st.sampled_from([1, 4, 8]))
    start = multiple * draw(st.integers(1, 4))
    end = start + multiple * draw(st.integers(1, 12))
    batch = draw(st.integers(1, 6))
    slowest = draw(st.integers(2, 80))
    fastest = draw(st.integers(1, slowest))
    interval = draw(st.integers(1, 12))
    bounds: dict[str, Json] = {"fastest": {"steps": fastest}, "slowest": {"steps": slowest}}
    if draw(st.booleans()):
        bounds = {name: {"tokens": value["steps"] * batch * start} for name, value in bounds.items()}
    curriculum = {
        "start": start,
        "end": end,
        "multiple": multiple,
        "interval": interval,
        "smoothing": draw(st.integers(1, interval)),
        "growth": draw(st.sampled_from([None, 1, 3])),
        "back": draw(st.sampled_from([None, 1, 5])),
    }
    # As many steps at full length as the slowest plan has altogether, so that every run gets that far.
    steps = slowest + draw(st.integers(1, 20))
    by_steps, budget = draw(st.booleans()), steps * batch * end
    warmup = {"steps": draw(st.integers(1, steps - 1))}
    if not by_steps and draw(st.booleans()):
        warmup = {"tokens": draw(st.integers(1, (steps - 2) * batch * end))}
    return adaptive_config(
        duration={"steps": steps} if by_steps else {"tokens": budget},
        learning_rate={"warmup": warmup, "decay_duration": {"tokens": budget}},
        seq_len=end + multiple * draw(st.integers(0, 1)),
        batch_size=batch,
        tail=draw(st.sampled_from(["truncate", "recycle"])),
        **bounds,
        **curriculum,
    )


def noise(seed: int) -> Losses:
    """Losses from calm to wild, with some that are not finite; the same for the same step and length."""

    def loss(step: PlannedStep) -> float:
        mixed = (step.step * 2654435761 + step.seq_len * 40503 + seed * 97) % 1009
        if mixed < 20:
            return float("nan") if mixed % 2 else float("inf")
        return 3.0 + 3.0 * (mixed / 1009) ** 4 - 0.001 * step.step

    return loss
