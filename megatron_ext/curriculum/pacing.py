"""Pacing: at which step or token count the sequence length and the batch size rise, in exact integers.

A pacing is written as a ladder: the values it takes and where each begins. A ladder is what the paper's formula gives
when it is solved for the step instead of evaluated at every step. For start s, end e, duration T, multiple m and degree
r, the length ``s + (e - s) * min(t/T, 1)^(1/r)`` floored to a multiple of m is at least ``s + k*m`` exactly from

    t = ceil(T * (k*m)^r / (e - s)^r)

on (s and e are multiples of m). Python integers make this exact; evaluating the formula in floats is one step late
where ``t/T`` rounds down at a boundary.

Sources: the paper's section 4 (linear), the DeepSpeed curriculum learning tutorial (root and discrete pacing), and
Megatron-LM's ``--rampup-batch-size`` (equal increments of the batch size).
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from megatron_ext.base import Duration
from megatron_ext.config.curriculum import (
    AdaptivePacing,
    BatchSizeWarmup,
    ConstantPacing,
    CurriculumConfig,
    DiscretePacing,
    MixedPacing,
    RootPacing,
)


@dataclass(frozen=True)
class Level:
    """One value of a ladder and where it begins."""

    value: int
    """Tokens per sequence, or sequences per batch."""

    begins: int
    """Steps done, or tokens consumed, before the first step that has this value."""

    in_tokens: bool
    """``begins`` counts tokens; otherwise steps."""

    from_previous: bool = False
    """``begins`` counts from the first step of the previous level; otherwise from the start of the run."""


Ladder = tuple[Level, ...]


def length_ladder(curriculum: CurriculumConfig, seq_len: int) -> Ladder:
    """Levels of the sequence length, in tokens, that ``curriculum`` asks for.

    ``seq_len`` is the full length: where the growth ends unless the curriculum has an ``end`` of its own. Of adaptive
    pacing these are the levels of its slowest plan, which are there before anything was decided.
    """
    if isinstance(curriculum, AdaptivePacing):
        curriculum = curriculum.bound("slowest")
    assert not isinstance(curriculum, MixedPacing), "mixed lengths do not rise; they are a cycle (cycle.py)"
    if isinstance(curriculum, ConstantPacing):
        return constant(seq_len)
    if isinstance(curriculum, DiscretePacing):
        stages = [(stage.seq_len, stage.duration) for stage in curriculum.stages]
        return discrete(stages, full=seq_len)
    end = seq_len if curriculum.end is None else curriculum.end
    degree = curriculum.degree if isinstance(curriculum, RootPacing) else 1
    return rising(curriculum.start, end, multiple=curriculum.multiple, duration=curriculum.duration, degree=degree)


def batch_ladder(warmup: BatchSizeWarmup | None, batch_size: int) -> Ladder:
    """Levels of the batch size, in sequences.

    GPT-3's batch-size warmup: the increments are spread equally over the duration, so that the k-th of K begins at
    ``ceil(T * k / K)`` and the full batch size is there at T exactly.
    """
    if warmup is None:
        return constant(batch_size)
    return rising(warmup.start, batch_size, multiple=warmup.increment, duration=warmup.duration)


def value_at(ladder: Ladder, *, step: int, tokens: int) -> int:
    """The value for the step before which ``step`` steps are done and ``tokens`` tokens consumed.

    For ladders of one unit that count from the start of the run, as ``rising`` makes them. O(log levels).
    """
    done = tokens if ladder[0].in_tokens else step
    return ladder[bisect_right(ladder, done, key=_begins) - 1].value


def constant(value: int) -> Ladder:
    """The ladder of one level."""
    return (Level(value=value, begins=0, in_tokens=False),)


def rising(start: int, end: int, *, multiple: int, duration: Duration, degree: int = 1) -> Ladder:
    """Linear growth, or root growth of ``degree`` > 1, from ``start`` to ``end`` in jumps of ``multiple``.

    ``end - start`` must be a multiple of ``multiple`` (the config's checks see to it). Levels that would begin at the
    same point as a higher one are left out, so a duration shorter than the number of levels skips some of them.
    """
    rise = end - start
    assert start > 0, f"a ladder starts above 0, not at {start}"
    assert rise >= 0, f"a ladder from {start} to {end} does not rise"
    assert rise % multiple == 0, f"the rise from {start} to {end} is no multiple of {multiple}"
    total, in_tokens = _amount(duration)
    highest_at: dict[int, int] = {0: start}
    for height in range(multiple, rise + 1, multiple):
        highest_at[_ceil_div(total * height**degree, rise**degree)] = start + height
    return tuple(Level(value=value, begins=begins, in_tokens=in_tokens) for begins, value in highest_at.items())


def discrete(stages: list[tuple[int, Duration]], *, full: int) -> Ladder:
    """Stages of (value, duration) one after the other, then ``full``; a duration counts from its stage's first step.

    Equal neighbors become one level only in the plan's segments; here every stage keeps its own duration.
    """
    levels = [Level(value=stages[0][0], begins=0, in_tokens=False)]
    values = [value for value, _ in stages[1:]] + [full]
    for value, (_, duration) in zip(values, stages, strict=True):
        amount, in_tokens = _amount(duration)
        levels.append(Level(value=value, begins=amount, in_tokens=in_tokens, from_previous=True))
    assert all(low.value <= high.value for low, high in pairwise(levels)), "discrete stages must rise"
    return tuple(levels)


def _amount(duration: Duration) -> tuple[int, bool]:
    if duration.tokens is not None:
        return duration.tokens, True
    assert duration.steps is not None
    return duration.steps, False


def _begins(level: Level) -> int:
    return level.begins


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
