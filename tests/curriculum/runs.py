"""Small runs for the curriculum's tests: a reference that walks one step at a time, and adaptive ones without a model.

The reference shares no code with the plan: it evaluates each pacing formula at every step, in fractions.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum import MixedPacing
from megatron_ext.curriculum.adaptive import AdaptiveSchedule
from megatron_ext.curriculum.plan import Decision, PlannedStep

Json = dict[str, Any]

# No deadline: how long an example takes says more about the machine's other work than about the code.
property_test = settings(deadline=None, max_examples=60)


def run_config(
    *,
    seq_len: int,
    batch_size: int,
    duration: Json,
    curriculum: Json | None = None,
    learning_rate: Json | None = None,
    **sections: Json,
) -> RunConfig:
    """A tiny model with this run."""
    training = {"seq_len": seq_len, "batch_size": batch_size, "duration": duration} | sections.pop("training", {})
    content = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1},
        "data": {"sources": [{"prefix": "corpus"}]} | sections.pop("data", {}),
        "training": training,
        "curriculum": curriculum or {"pacing": "constant"},
        "learning_rate": learning_rate or {"peak": 1e-3},
        **sections,
    }
    return RunConfig.model_validate_json(json.dumps(content))


def formula_value(pacing: Json, *, end: int, progress: int) -> int:
    """Linear and root pacing, exactly: start + rise * min(x/T, 1)^(1/r), floored to a multiple."""
    total = pacing["duration"].get("steps") or pacing["duration"].get("tokens")
    degree = pacing.get("degree", 1)
    start, multiple = pacing["start"], pacing["multiple"]
    share = min(Fraction(progress, total), Fraction(1))
    height = 0
    while height + multiple <= end - start and Fraction(height + multiple, end - start) ** degree <= share:
        height += multiple
    return int(start + height)


def cycle_of(curriculum: Json) -> tuple[int, ...]:
    """The order of mixed lengths under the default seed; what the order is, test_pacings.py says."""
    return MixedPacing.model_validate_json(json.dumps(curriculum)).cycle(seed=1234)


@dataclass
class WalkedStep:
    """What the reference says of one step."""

    batch_size: int
    seq_len: int
    consumed_tokens: int


def walk(seq_len: int, batch_size: int, curriculum: Json, batch_warmup: Json | None) -> Iterator[WalkedStep]:
    """Steps of a run without end, by the formulas."""
    step = tokens = 0
    stage, stage_step, stage_tokens = 0, 0, 0
    cycle = cycle_of(curriculum) if curriculum["pacing"] == "mixed" else ()
    while True:
        if curriculum["pacing"] == "constant":
            length = seq_len
        elif curriculum["pacing"] == "mixed":
            length = cycle[step % len(cycle)]
        elif curriculum["pacing"] == "discrete":
            stages = curriculum["stages"]
            if stage < len(stages):
                duration = stages[stage]["duration"]
                done = step - stage_step if "steps" in duration else tokens - stage_tokens
                if done >= (duration.get("steps") or duration.get("tokens")):
                    stage, stage_step, stage_tokens = stage + 1, step, tokens
            length = stages[stage]["seq_len"] if stage < len(stages) else seq_len
        else:
            progress = step if "steps" in curriculum["duration"] else tokens
            length = formula_value(curriculum, end=curriculum.get("end") or seq_len, progress=progress)
        batch = batch_size
        if batch_warmup:
            pacing = batch_warmup | {"multiple": batch_warmup["increment"]}
            progress = step if "steps" in batch_warmup["duration"] else tokens
            batch = formula_value(pacing, end=batch_size, progress=progress)
        yield WalkedStep(batch_size=batch, seq_len=length, consumed_tokens=tokens)
        step, tokens = step + 1, tokens + batch * length


@st.composite
def durations(draw: st.DrawFn, steps: int = 40, tokens: int = 800) -> Json:
    if draw(st.booleans()):
        return {"steps": draw(st.integers(1, steps))}
    return {"tokens": draw(st.integers(1, tokens))}


@st.composite
def curricula(draw: st.DrawFn, mixed: bool = True) -> tuple[int, Json]:
    multiple = draw(st.sampled_from([1, 2, 8]))
    start = multiple * draw(st.integers(1, 4))
    end = start + multiple * draw(st.integers(0, 12))
    pacing = draw(st.sampled_from(["constant", "linear", "root", "discrete", *(["mixed"] if mixed else [])]))
    if pacing == "constant" or (pacing in ("discrete", "mixed") and start == end):
        return end, {"pacing": "constant"}
    if pacing in ("discrete", "mixed"):
        heights = draw(st.lists(st.integers(0, (end - start) // multiple - 1), min_size=1, max_size=4, unique=True))
        lengths = [start + multiple * height for height in sorted(heights)]
        if pacing == "mixed":
            cycles = {"lengths": [*lengths, end], "per_cycle": draw(st.integers(1, 3))}
            return end, {"pacing": pacing, "multiple": multiple, **cycles}
        stages = [{"seq_len": length, "duration": draw(durations(steps=15, tokens=300))} for length in lengths]
        return end, {"pacing": pacing, "stages": stages, "multiple": multiple}
    seq_len = end + multiple * draw(st.integers(0, 1))
    curriculum = {"pacing": pacing, "start": start, "end": end, "multiple": multiple, "duration": draw(durations())}
    if pacing == "root":
        curriculum["degree"] = draw(st.integers(1, 4))
    return seq_len, curriculum


@dataclass
class Case:
    """A run that the plan accepts, and the reference's steps up to its end (and one more, for the totals)."""

    config: RunConfig
    steps: list[WalkedStep] = field(repr=False)
    tokens: int


@st.composite
def cases(draw: st.DrawFn, tail: str = "truncate", mixed: bool = True) -> Case:
    """Runs of a few dozen steps that last beyond their warmups, with every shape of learning rate."""
    seq_len, curriculum = draw(curricula(mixed))
    batch_size, batch_warmup = draw(st.integers(1, 12)), None
    if curriculum["pacing"] == "constant" and tail == "truncate" and draw(st.booleans()):
        increment = draw(st.integers(1, 3))
        start = draw(st.integers(1, 3))
        batch_size = start + increment * draw(st.integers(0, 5))
        batch_warmup = {"start": start, "increment": increment, "duration": draw(durations())}
    steps = _until_full(seq_len, batch_size, curriculum, batch_warmup, extra=draw(st.integers(1, 25)))
    last = steps[-1]
    tokens = last.consumed_tokens + last.batch_size * last.seq_len
    budget = draw(st.integers(last.consumed_tokens + 1, tokens))
    by_steps = draw(st.booleans())
    config = run_config(
        seq_len=seq_len,
        batch_size=batch_size,
        duration={"steps": len(steps)} if by_steps else {"tokens": budget},
        curriculum=curriculum,
        learning_rate=draw(_learning_rates(steps, tokens if by_steps else budget, may_outlast=by_steps)),
        data={"tail": tail},
        training={"batch_size_warmup": batch_warmup} if batch_warmup else {},
    )
    return Case(config=config, steps=steps, tokens=tokens)


def _until_full(
    seq_len: int, batch_size: int, curriculum: Json, batch_warmup: Json | None, *, extra: int
) -> list[WalkedStep]:
    """The reference's steps up to ``extra`` steps at the full length and batch, with every warmup behind them."""
    steps: list[WalkedStep] = []
    full_length = curriculum.get("end") or seq_len
    warmups = [part["duration"] for part in (curriculum, batch_warmup or {}) if "duration" in part]
    for step in walk(seq_len, batch_size, curriculum, batch_warmup):
        ended = all(
            len(steps) >= warmup.get("steps", 0) and step.consumed_tokens >= warmup.get("tokens", 0)
            for warmup in warmups
        )
        steps.append(step)
        extra -= ended and step.seq_len == full_length and step.batch_size == batch_size
        if extra == 0:
            return steps
    raise AssertionError("walk has no end")


@st.composite
def _learning_rates(draw: st.DrawFn, steps: list[WalkedStep], end_tokens: int, *, may_outlast: bool) -> Json:
    peak = draw(st.floats(1e-5, 1.0))
    rates: Json = {"peak": peak, "min": peak * draw(st.floats(0, 1))}
    warmup_steps = draw(st.integers(0, len(steps) - 1))
    warmup_end = steps[warmup_steps].consumed_tokens
    if warmup_steps:
        earlier = steps[warmup_steps - 1].consumed_tokens
        in_tokens = {"tokens": draw(st.integers(earlier + 1, warmup_end))}
        rates["warmup"] = draw(st.sampled_from([{"steps": warmup_steps}, in_tokens]))
    rates["decay"] = draw(st.sampled_from(["cosine", "linear", "constant", "wsd"]))
    if rates["decay"] == "constant":
        return rates
    if draw(st.booleans()):
        end_tokens = draw(st.integers(warmup_end + 1, end_tokens * (2 if may_outlast else 1)))
        rates["decay_duration"] = {"tokens": end_tokens}
    if rates["decay"] == "wsd":
        rates["cooldown"] = {"tokens": draw(st.integers(1, end_tokens - warmup_end))}
    return rates


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
    schedule = config.schedule()
    assert isinstance(schedule, AdaptiveSchedule)
    return schedule


def adaptive_walk(
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
    *_, done = adaptive_walk(schedule, losses, **options)
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
