"""The curriculum section: how the sequence length grows, and batch-size warmup as its comparator."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.base import Duration, NonNegativeFloat, PositiveInt, Section


class ConstantPacing(Section):
    """Every step at the full length: the baseline."""

    pacing: Literal["constant"] = "constant"
    """Selects this pacing."""


class _Rising(Section):
    start: PositiveInt
    """Length of the first step, in tokens; a multiple of ``multiple`` (paper: 8 for millions, 64 for billions of
    parameters)."""

    end: PositiveInt | None = None
    """Length from the end of the warmup on; by default ``training.seq_len``."""

    multiple: PositiveInt = 8
    """Lengths are floored to a multiple of this (8 keeps Tensor Cores aligned)."""


class _Growing(_Rising):
    duration: Duration
    """T of the paper: the length reaches ``end`` at this step or token count."""


class LinearPacing(_Growing):
    """Sequence Length Warmup of the paper: L(t) = start + (end - start) * min(t/T, 1), floored to a multiple."""

    pacing: Literal["linear"]
    """Selects this pacing."""


class RootPacing(_Growing):
    """L(t) = start + (end - start) * min(t/T, 1)^(1/degree), floored to a multiple."""

    pacing: Literal["root"]
    """Selects this pacing."""

    degree: PositiveInt = 2
    """The root's degree; 1 is linear."""


class Stage(Section):
    """One stage of discrete pacing."""

    seq_len: PositiveInt
    """Length of the stage, in tokens."""

    duration: Duration
    """How long the stage lasts, from its own beginning."""


class DiscretePacing(Section):
    """Fixed lengths one after the other, then the full length; with one stage this is Shortformer's two-stage run."""

    pacing: Literal["discrete"]
    """Selects this pacing."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """The stages before the full length, lengths rising."""

    multiple: PositiveInt = 8
    """Every stage's length is a multiple of this."""


class MixedPacing(Section):
    """Short and long steps from the first step on, the comparator that mixes lengths instead of growing them."""

    pacing: Literal["mixed"]
    """Selects this pacing."""

    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    """Lengths of the steps, in tokens, rising to ``training.seq_len``; all are equally frequent."""

    per_cycle: PositiveInt = 8
    """How often each length occurs in a cycle of steps. The run's seed shuffles the cycle, which then repeats."""

    multiple: PositiveInt = 8
    """Every length is a multiple of this."""


class AdaptivePacing(_Rising):
    """The length grows while training is calm, holds or steps back while it is not, between two linear plans."""

    pacing: Literal["adaptive"]
    """Selects this pacing."""

    fastest: Duration
    """T of the linear plan that the length never exceeds."""

    slowest: Duration
    """T of the linear plan below which the length never falls, in the unit of ``fastest`` and at least as long; it
    bounds the steps that the run takes."""

    interval: PositiveInt = 20
    """Steps between decisions."""

    smoothing: PositiveInt = 5
    """Losses are judged as the median of this many steps, so that the noise of single batches does not decide; at most
    ``interval``."""

    hold_above: Annotated[float, Field(gt=1)] = 1.1
    """The length does not grow where the ratio of the median loss to the lowest one reached before was above this in
    the interval."""

    back_above: Annotated[float, Field(gt=1)] = 1.3
    """The length steps back where that ratio was above this and has not fallen since the decision before; at least
    ``hold_above``."""

    variance_above: NonNegativeFloat = 0.0
    """The length does not grow where the largest element of sqrt(Adam's second moment) was above this many times its
    running median in the interval; 0: not looked at. Seen only at steps where that variance is measured."""

    growth: PositiveInt | None = None
    """Multiples that a decision to grow adds; by default twice what the fastest plan adds in an interval, so that a
    run that was held catches up."""

    back: PositiveInt | None = None
    """Multiples that a step back takes off; by default as many as ``growth``."""

    def bound(self, which: Literal["fastest", "slowest"]) -> LinearPacing:
        """One of the two linear plans."""
        duration = self.fastest if which == "fastest" else self.slowest
        return LinearPacing(pacing="linear", start=self.start, end=self.end, multiple=self.multiple, duration=duration)


CurriculumConfig = Annotated[
    ConstantPacing | LinearPacing | RootPacing | DiscretePacing | MixedPacing | AdaptivePacing,
    Field(discriminator="pacing"),
]


class BatchSizeWarmup(Section):
    """GPT-3's batch-size warmup: from ``start`` to ``training.batch_size`` in equal increments over ``duration``."""

    start: PositiveInt
    """Sequences in the first step's batch."""

    increment: PositiveInt
    """Sequences added at a time; divides the distance to ``training.batch_size``."""

    duration: Duration
    """The full batch size is reached at this step or token count."""
