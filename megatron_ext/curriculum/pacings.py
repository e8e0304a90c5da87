"""Pacings: how the sequence length changes over a run. One class each: its keys, checks, description and segments.

A new pacing is a class here and its entry in ``_CLASSES``. Sources: the paper's section 4 (linear), the DeepSpeed
curriculum learning tutorial (root and discrete pacing); adaptive and mixed pacing are ours (docs/curriculum.md).
"""

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import ConfigDict, Field

from megatron_ext.base import Duration, NonNegativeFloat, PositiveInt, Section
from megatron_ext.curriculum.pacing import Pacing, Rising, RunSpec, no_multiple
from megatron_ext.curriculum.segments import (
    CycleSegments,
    Levels,
    Segment,
    amounts,
    constant,
    discrete,
    rising,
    too_long,
    total,
)


class ConstantPacing(Pacing):
    """Every step at the full length: the baseline."""

    model_config = ConfigDict(json_schema_extra=None)

    pacing: Literal["constant"] = "constant"
    """Selects this pacing."""

    changes_length = False

    def describe(self, seq_len: int) -> str:
        return f"none: {seq_len} tokens from the first step on"

    def levels(self, seq_len: int) -> Levels:
        return constant(seq_len)


class _Growing(Rising):
    duration: Duration
    """T of the paper: the length reaches ``end`` at this step or token count."""

    def describe(self, seq_len: int) -> str:
        lengths = f"{self.start} to {self.last_length(seq_len)} over {self.duration}"
        return f"{self.pacing}: {lengths}, multiples of {self.multiple}"

    def problems(self, run: RunSpec) -> Iterator[str]:
        yield from super().problems(run)
        yield from too_long("curriculum.duration", self.duration, run.duration)

    def levels(self, seq_len: int) -> Levels:
        degree = int(getattr(self, "degree", 1))
        end = self.last_length(seq_len)
        return rising(self.start, end, multiple=self.multiple, duration=self.duration, degree=degree)

    def tuned(self, *, start: int, steps: int) -> dict[str, Any]:
        return super().tuned(start=start, steps=steps) | ({} if self.end is None else {"end": self.end})


class LinearPacing(_Growing):
    """Sequence Length Warmup of the paper: L(t) = start + (end - start) * min(t/T, 1), floored to a multiple."""

    pacing: Literal["linear"] = "linear"
    """Selects this pacing."""


class RootPacing(_Growing):
    """L(t) = start + (end - start) * min(t/T, 1)^(1/degree), floored to a multiple."""

    pacing: Literal["root"] = "root"
    """Selects this pacing."""

    degree: PositiveInt = 2
    """The root's degree; 1 is linear."""

    def tuned(self, *, start: int, steps: int) -> dict[str, Any]:
        return super().tuned(start=start, steps=steps) | {"pacing": "root", "degree": self.degree}


class Stage(Section):
    """One stage of discrete pacing."""

    seq_len: PositiveInt
    """Length of the stage, in tokens."""

    duration: Duration
    """How long the stage lasts, from its own beginning."""


class DiscretePacing(Pacing):
    """Fixed lengths one after the other, then the full length; with one stage this is Shortformer's two-stage run."""

    pacing: Literal["discrete"] = "discrete"
    """Selects this pacing."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """The stages before the full length, lengths rising."""

    multiple: PositiveInt = 8
    """Every stage's length is a multiple of this."""

    def describe(self, seq_len: int) -> str:
        stages = ", ".join(f"{stage.seq_len} for {stage.duration}" for stage in self.stages)
        return f"discrete: {stages}, then {seq_len}"

    def problems(self, run: RunSpec) -> Iterator[str]:
        lengths = [stage.seq_len for stage in self.stages]
        for index, length in enumerate(lengths):
            yield from no_multiple(f"curriculum.stages[{index}].seq_len", length, self.multiple, most=run.seq_len)
        for index, (before, after) in enumerate(pairwise(lengths), start=1):
            if after <= before:
                yield (
                    f"curriculum.stages[{index}].seq_len is {after} after a stage of {before}: lengths must rise from "
                    "stage to stage; reorder or remove stages"
                )
        if lengths[-1] >= run.seq_len:
            yield (
                f"curriculum.stages[{len(lengths) - 1}].seq_len is {lengths[-1]}, but training.seq_len {run.seq_len} "
                "follows by itself after the last stage: write only stages below it"
            )
        together = total([stage.duration for stage in self.stages])
        yield from too_long("the sum of curriculum.stages", together, run.duration)
        yield from super().problems(run)

    def levels(self, seq_len: int) -> Levels:
        return discrete([(stage.seq_len, stage.duration) for stage in self.stages], full=seq_len)


class MixedPacing(Pacing):
    """Short and long steps from the first step on, the comparator that mixes lengths instead of growing them."""

    pacing: Literal["mixed"] = "mixed"
    """Selects this pacing."""

    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=2)]
    """Lengths of the steps, in tokens, rising to ``training.seq_len``; all are equally frequent."""

    per_cycle: PositiveInt = 8
    """How often each length occurs in a cycle of steps. The run's seed shuffles the cycle, which then repeats."""

    multiple: PositiveInt = 8
    """Every length is a multiple of this."""

    def describe(self, seq_len: int) -> str:  # noqa: ARG002
        return f"mixed: steps of {', '.join(map(str, self.lengths))} tokens in a cycle that the seed shuffles"

    def problems(self, run: RunSpec) -> Iterator[str]:
        lengths, full = self.lengths, run.seq_len
        for index, length in enumerate(lengths):
            yield from no_multiple(f"curriculum.lengths[{index}]", length, self.multiple, most=full)
        if any(after <= before for before, after in pairwise(lengths)):
            yield f"curriculum.lengths is {list(lengths)}: write each length once, rising"
        elif lengths[-1] != full:
            yield (
                f"curriculum.lengths ends with {lengths[-1]}, not with training.seq_len {full}, at which validation "
                f"runs: make {full} the last length"
            )
        yield from super().problems(run)

    def cycle(self, seed: int) -> tuple[int, ...]:
        """Lengths of one cycle's steps, in tokens: each of ``lengths`` ``per_cycle`` times.

        The order is that of the SHA-256 of seed and place: the same under every version of every library, which a
        random generator's is not.
        """
        lengths = [length for length in self.lengths for _ in range(self.per_cycle)]
        keys = (hashlib.sha256(f"mixed lengths {seed} {place}".encode()).digest() for place in range(len(lengths)))
        return tuple(length for _, length in sorted(zip(keys, lengths, strict=True)))

    def segments(self, run: RunSpec) -> Sequence[Segment]:
        stream_seq_len = run.seq_len if run.tail == "recycle" else None
        first = CycleSegments(self.cycle(run.seed), run.batch_size, steps=1, stream_seq_len=stream_seq_len)
        return first.until(run.duration)


class AdaptivePacing(Rising):
    """The length grows while training is calm, holds or steps back while it is not, between two linear plans."""

    pacing: Literal["adaptive"] = "adaptive"
    """Selects this pacing."""

    fastest: Duration
    """T of the linear plan that the length never exceeds."""

    slowest: Duration
    """T of the linear plan below which the length never falls, in the unit of ``fastest`` and at least as long; it
    bounds the steps that the run takes."""

    interval: PositiveInt = 20
    """Steps between decisions."""

    smoothing: PositiveInt = 5
    """Losses count as the median of this many steps, so that the noise of single batches does not decide; at most
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

    @property
    def variance_limit(self) -> float:
        return self.variance_above

    def bounds(self) -> Mapping[str, Pacing]:
        def linear(duration: Duration) -> Pacing:
            return LinearPacing(start=self.start, end=self.end, multiple=self.multiple, duration=duration)

        return {"fastest": linear(self.fastest), "slowest": linear(self.slowest)}

    def describe(self, seq_len: int) -> str:
        over = f"{self.fastest} at the fastest to {self.slowest} at the slowest"
        decisions = f"a decision every {self.interval} steps"
        return f"adaptive: {self.start} to {self.last_length(seq_len)} over {over}, {decisions}"

    def levels(self, seq_len: int) -> Levels:
        """Those of the slowest plan, which are there before anything was decided."""
        return self.bounds()["slowest"].levels(seq_len)

    def problems(self, run: RunSpec) -> Iterator[str]:
        yield from super().problems(run)
        yield from too_long("curriculum.slowest", self.slowest, run.duration)
        yield from self._bound_problems()
        if self.back_above < self.hold_above:
            yield (
                f"curriculum.back_above is {self.back_above:g}, less than curriculum.hold_above "
                f"{self.hold_above:g}: write at least {self.hold_above:g}"
            )
        if self.smoothing > self.interval:
            yield (
                f"curriculum.smoothing is {self.smoothing}, more than the steps between decisions, "
                f"curriculum.interval {self.interval}: write at most {self.interval}"
            )
        if 0 < self.variance_above <= 1:
            yield (
                f"curriculum.variance_above is {self.variance_above:g}, which half of all measurements exceed: "
                "write more than 1, or 0 to turn it off"
            )
        if run.learning_rate.decay != "constant":
            yield from self._decay_problems(run)

    def _bound_problems(self) -> Iterator[str]:
        fastest, slowest = self.fastest, self.slowest
        found = amounts(fastest, slowest)
        if found is None:
            yield (
                f"curriculum.fastest is {fastest} and curriculum.slowest is {slowest}: they bound the length at the "
                "same point of the run; write both in steps or both in tokens"
            )
        elif found[0] > found[1]:
            yield (
                f"curriculum.fastest is {fastest}, longer than curriculum.slowest, {slowest}: a plan that takes longer "
                "is slower; exchange the two"
            )

    def _decay_problems(self, run: RunSpec) -> Iterator[str]:
        """The decay is placed on consumed tokens before it is known how many tokens a number of steps will consume."""
        rate, why = run.learning_rate, 'under curriculum.pacing "adaptive" steps have no known number of tokens'
        end, end_key = rate.decay_end(run.duration)
        if end.tokens is None:
            yield (
                f"{end_key} is {end}, where the learning rate ends its decay, but {why}: "
                'write learning_rate.decay_duration {"tokens": n}, or learning_rate.decay "constant"'
            )
            return
        latest = end.tokens
        if rate.decay == "wsd" and rate.cooldown is not None:
            if rate.cooldown.tokens is None:
                yield f'learning_rate.cooldown is {rate.cooldown}, but {why}: write {{"tokens": n}}'
                return
            latest -= rate.cooldown.tokens
        batch = run.batch_size * run.seq_len
        if rate.warmup is not None and rate.warmup.tokens is not None and rate.warmup.tokens + batch > latest:
            yield (
                f"learning_rate.warmup is {rate.warmup} and may end up to a batch ({batch:,} tokens) later, which "
                f"leaves no decay before {latest:,} tokens: shorten the warmup"
            )


_CLASSES: Final[tuple[type[Pacing], ...]] = (
    ConstantPacing,
    LinearPacing,
    RootPacing,
    DiscretePacing,
    MixedPacing,
    AdaptivePacing,
)
PACINGS: Final[Mapping[str, type[Pacing]]] = {
    get_args(model.model_fields["pacing"].annotation)[0]: model for model in _CLASSES
}
"""The registry: the value of the key ``pacing`` -> its class."""

if TYPE_CHECKING:
    CurriculumConfig = Pacing
else:
    CurriculumConfig = Annotated[reduce(operator.or_, _CLASSES), Field(discriminator="pacing")]
