"""The curriculum section: how the sequence length grows, and batch-size warmup as its comparator."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import Duration, PositiveInt, Section


class ConstantPacing(Section):
    """Every step at the full length: the baseline."""

    pacing: Literal["constant"] = "constant"
    """Selects this pacing."""


class _Growing(Section):
    start: PositiveInt
    """Length of the first step, in tokens; a multiple of ``multiple`` (paper: 8 for millions, 64 for billions of
    parameters)."""

    end: PositiveInt | None = None
    """Length from the end of the warmup on; by default ``training.seq_len``."""

    multiple: PositiveInt = 8
    """Lengths are floored to a multiple of this (8 keeps Tensor Cores aligned)."""

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


CurriculumConfig = Annotated[ConstantPacing | LinearPacing | RootPacing | DiscretePacing, Field(discriminator="pacing")]


class BatchSizeWarmup(Section):
    """GPT-3's batch-size warmup: from ``start`` to ``training.batch_size`` in equal increments over ``duration``."""

    start: PositiveInt
    """Sequences in the first step's batch."""

    increment: PositiveInt
    """Sequences added at a time; divides the distance to ``training.batch_size``."""

    duration: Duration
    """The full batch size is reached at this step or token count."""
