"""The size of a run, and what every pacing answers about it; the pacings themselves are in pacings.py."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import ConfigDict

from megatron_ext.base import MAX_COUNT, Duration, PositiveInt, Section, Seed
from megatron_ext.curriculum.learning_rate import LearningRateConfig
from megatron_ext.curriculum.segments import (
    Levels,
    Phase,
    Segment,
    constant,
    cut,
    phases_of,
    rising,
    samples_of_streams,
    too_long,
)
from megatron_ext.errors import UserError

Tail = Literal["truncate", "recycle"]
_KEY: Final = "training.batch_size_warmup"


class BatchSizeWarmup(Section):
    """GPT-3's batch-size warmup: from ``start`` to ``training.batch_size`` in equal increments over ``duration``."""

    start: PositiveInt
    """Sequences in the first step's batch."""

    increment: PositiveInt
    """Sequences added at a time; divides the distance to ``training.batch_size``."""

    duration: Duration
    """The full batch size is reached at this step or token count."""


class RunSpec(Section):
    """The size of a run. Messages name its fields as a run config does (``training.seq_len``)."""

    seq_len: PositiveInt
    """Full length in tokens: that of a dataset sample, and where the length ends."""

    batch_size: PositiveInt
    """Sequences per optimizer step over all ranks."""

    duration: Duration
    """The run ends with the step that reaches this many steps or tokens."""

    learning_rate: LearningRateConfig = LearningRateConfig(peak=1.0, decay="constant")
    """By default a plan's learning rate is 1.0 throughout."""

    batch_size_warmup: BatchSizeWarmup | None = None
    """Not together with a changing length."""

    tail: Tail = "truncate"
    """What becomes of the rest of a sample when a step is shorter (see sampler.py)."""

    seed: Seed = 1234
    """Shuffles the cycle of mixed lengths; no other pacing uses it."""

    def problems(self) -> Iterator[str]:
        """One line per contradiction among these values; durations in different units are left to the plan."""
        tokens = (self.duration.steps or 1) * self.batch_size * self.seq_len
        if tokens > MAX_COUNT:
            yield (
                f"training.duration is {self.duration}, which at training.batch_size {self.batch_size:,} and "
                f"training.seq_len {self.seq_len:,} is {tokens:,} tokens: write values whose product is at most "
                f"{MAX_COUNT:,}"
            )
        if self.batch_size_warmup is not None:
            yield from self._warmup_problems(self.batch_size_warmup)
        yield from self.learning_rate.problems(self.duration)

    def _warmup_problems(self, warmup: BatchSizeWarmup) -> Iterator[str]:
        full = self.batch_size
        if warmup.start > full:
            yield f"{_KEY}.start is {warmup.start}, more than training.batch_size {full}: write at most {full}"
        elif (full - warmup.start) % warmup.increment:
            distance = full - warmup.start
            yield (
                f"{_KEY}.increment is {warmup.increment}, which does not divide the {distance} sequences from "
                f"{_KEY}.start {warmup.start} to training.batch_size {full}: write "
                f"{_nearest_divisors(distance, warmup.increment)}"
            )
        if self.tail == "recycle":
            yield (
                f'{_KEY} is given with data.tail "recycle", which needs the same number of sequences at every step: '
                'write data.tail "truncate"'
            )
        yield from too_long(f"{_KEY}.duration", warmup.duration, self.duration)

    def batch_sizes(self) -> Levels:
        """Levels of the batch size, in sequences.

        GPT-3's warmup (Megatron-LM's ``--rampup-batch-size``) spreads its increments equally over the duration: the
        k-th of K begins at ``ceil(T * k / K)``, and the full batch size is there at T exactly.
        """
        warmup = self.batch_size_warmup
        if warmup is None:
            return constant(self.batch_size)
        return rising(warmup.start, self.batch_size, multiple=warmup.increment, duration=warmup.duration)

    def segments(self, phases: Sequence[Phase]) -> tuple[Segment, ...]:
        """The phases up to the end of the run, with the samples that ``tail`` draws before each."""
        segments = cut(phases, self.duration)
        if self.tail == "truncate":
            return segments
        drawn = (samples_of_streams(s.batch_size, np.array([s.first_tokens]), self.seq_len)[0] for s in segments)
        return tuple(replace(s, first_samples=int(samples)) for s, samples in zip(segments, drawn, strict=True))


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [value for value in range(1, number + 1) if number % value == 0]
    below = max(value for value in divisors if value < wanted)
    above = min((value for value in divisors if value > wanted), default=None)
    return f"{below} or {above}" if above else str(below)


def _pacing_required(schema: dict[str, Any]) -> None:
    """In a file the key selects the class, so it has to be there; in Python the class has been chosen already."""
    schema["properties"]["pacing"].pop("default", None)
    schema["required"] = [name for name in schema["properties"] if name in {*schema.get("required", ()), "pacing"}]


class Pacing(Section):
    """What every pacing answers. By default it has ``levels`` that rise to the full length and nothing to decide."""

    model_config = ConfigDict(json_schema_extra=_pacing_required)

    if TYPE_CHECKING:
        pacing: str

    changes_length: ClassVar[bool] = True
    """Whether steps differ in length."""

    def describe(self, seq_len: int) -> str:
        """One line for people; ``seq_len`` is the full length."""
        raise NotImplementedError

    def problems(self, run: RunSpec) -> Iterator[str]:
        """One line per contradiction, in itself or with the run: key, value, what to write."""
        if self.changes_length and run.batch_size_warmup is not None:
            yield (
                f'{_KEY} and curriculum.pacing "{self.pacing}" are both given, and both shrink the tokens of a '
                f'batch: set {_KEY} to null, or write curriculum {{"pacing": "constant"}}'
            )

    def levels(self, seq_len: int) -> Levels:
        """Levels of the sequence length, in tokens; ``seq_len`` is the full length."""
        raise NotImplementedError

    def segments(self, run: RunSpec) -> Sequence[Segment]:
        """The whole run. Raises UserError if it ends before a step at the full length and batch size."""
        phases = phases_of(self.levels(run.seq_len), run.batch_sizes())
        segments = run.segments(phases)
        _check_warmups_end(phases, segments, run.duration)
        return segments

    def bounds(self) -> Mapping[str, "Pacing"]:
        """The fastest and the slowest pacing between which an adaptive one decides; none where all is known before."""
        return {}

    @property
    def step_between_lengths(self) -> int:
        """Tokens of which lengths are multiples."""
        return int(getattr(self, "multiple", 8))

    def last_length(self, seq_len: int) -> int:
        """Where the length ends, in tokens."""
        return seq_len

    @property
    def variance_limit(self) -> float:
        """Above which ratio to its median Adam's variance keeps the length from growing; 0: it is not looked at."""
        return 0.0

    def tuned(self, *, start: int, steps: int) -> dict[str, Any]:
        """A section that grows from ``start`` within ``steps`` steps: of this pacing, or linear in place of others."""
        multiple = self.step_between_lengths
        return {"pacing": "linear", "start": start, "multiple": multiple, "duration": {"steps": steps}}


class Rising(Pacing):
    """From a start to an end, in multiples."""

    start: PositiveInt
    """Length of the first step, in tokens; a multiple of ``multiple`` (paper: 8 for millions, 64 for billions of
    parameters)."""

    end: PositiveInt | None = None
    """Length from the end of the warmup on; by default ``training.seq_len``."""

    multiple: PositiveInt = 8
    """Lengths are floored to a multiple of this (8 keeps Tensor Cores aligned)."""

    def last_length(self, seq_len: int) -> int:
        return self.end or seq_len

    def problems(self, run: RunSpec) -> Iterator[str]:
        full, end = run.seq_len, self.last_length(run.seq_len)
        end_key = "training.seq_len (where the curriculum ends)" if self.end is None else "curriculum.end"
        yield from no_multiple("curriculum.start", self.start, self.multiple, most=full)
        yield from no_multiple(end_key, end, self.multiple, most=full if self.end is not None else 2 * full)
        if end > full:
            yield f"curriculum.end is {end}, more than training.seq_len {full}: write at most {full}"
        if self.start > end:
            yield (
                f"curriculum.start is {self.start}, more than the end of the curriculum, {end}: write a start of at "
                f"most {end}"
            )
        yield from super().problems(run)


def nearest_multiples(value: int, multiple: int, *, most: int) -> list[int]:
    """The multiples of ``multiple`` next to ``value``, between ``multiple`` and ``most``; none if there are none."""
    below = value // multiple * multiple
    largest = most // multiple * multiple
    candidates = {min(max(candidate, multiple), largest) for candidate in (below, below + multiple)}
    return sorted(candidate for candidate in candidates if candidate >= multiple)


def no_multiple(key: str, value: int, multiple: int, *, most: int) -> Iterator[str]:
    """A message if the length ``value`` of ``key`` is none of the multiples, which go up to ``most``."""
    if value % multiple == 0:
        return
    nearest = nearest_multiples(value, multiple, most=most)
    if nearest:
        advice = f"write {' or '.join(map(str, nearest))}"
    else:
        advice = f"no length up to training.seq_len {most} is one; write a smaller curriculum.multiple"
    yield f"{key} is {value}, which is no multiple of curriculum.multiple {multiple}: {advice}"


def _check_warmups_end(phases: Sequence[Phase], segments: Sequence[Segment], duration: Duration) -> None:
    run_steps, run_tokens = segments[-1].end_step, segments[-1].end_tokens
    for key, field in (("curriculum", "seq_len"), (_KEY, "batch_size")):
        final = getattr(phases[-1], field)
        reached = next(phase for phase in phases if getattr(phase, field) == final)
        if reached.first_step >= run_steps:
            raise UserError(
                f"{key} reaches {field} {final:,} at step {reached.first_step} ({reached.first_tokens:,} tokens), "
                f"but the run (training.duration {duration}) ends after {run_steps:,} steps ({run_tokens:,} tokens): "
                f"shorten the durations of {key} or lengthen training.duration"
            )
