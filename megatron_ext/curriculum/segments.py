"""The arithmetic of steps and tokens: levels, phases, segments, and the cycle of mixed lengths.

A pacing says which values the sequence length takes and where each begins: its *levels*. Levels of the length and of
the batch size together give *phases*, in which both are constant; phases cut off at the end of the run are *segments*.
Within a segment every step trains ``batch_size * seq_len`` tokens, so both directions (tokens after a number of steps,
steps until a number of tokens) are one division after a binary search. The number of segments is that of the lengths
and batch sizes, whatever the number of steps.

Levels are what the paper's formula gives when it is solved for the step instead of evaluated at every step. For start
s, end e, duration T, multiple m and degree r, the length ``s + (e - s) * min(t/T, 1)^(1/r)`` floored to a multiple of m
is at least ``s + k*m`` exactly from

    t = ceil(T * (k*m)^r / (e - s)^r)

on (s and e are multiples of m). Python integers make this exact; evaluating the formula in floats is one step late
where ``t/T`` rounds down at a boundary.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import overload

import numpy as np
import numpy.typing as npt

from megatron_ext.base import Duration

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """One value of the sequence length or batch size, and where it begins."""

    value: int  # tokens per sequence, or sequences per batch
    begins: int  # steps done, or tokens consumed, before the first step that has this value
    in_tokens: bool  # ``begins`` counts tokens; otherwise steps
    # ``begins`` counts from the first step of the previous level; otherwise from the start of the run.
    from_previous: bool = False


Levels = tuple[Level, ...]


def constant(value: int) -> Levels:
    """One level."""
    return (Level(value=value, begins=0, in_tokens=False),)


def rising(start: int, end: int, *, multiple: int, duration: Duration, degree: int = 1) -> Levels:
    """Linear growth, or root growth of ``degree`` > 1, from ``start`` to ``end`` in jumps of ``multiple``.

    ``end - start`` must be a multiple of ``multiple`` (the pacing's checks see to it). Levels that would begin at the
    same point as a higher one are left out, so a duration shorter than the number of levels skips some of them.
    """
    rise = end - start
    assert start > 0, f"levels start above 0, not at {start}"
    assert rise >= 0, f"levels from {start} to {end} do not rise"
    assert rise % multiple == 0, f"the rise from {start} to {end} is no multiple of {multiple}"
    total, in_tokens = amount(duration)
    highest_at: dict[int, int] = {0: start}
    for height in range(multiple, rise + 1, multiple):
        highest_at[-(-total * height**degree // rise**degree)] = start + height
    return tuple(Level(value=value, begins=begins, in_tokens=in_tokens) for begins, value in highest_at.items())


def discrete(stages: Sequence[tuple[int, Duration]], *, full: int) -> Levels:
    """Stages of (value, duration) one after the other, then ``full``; a duration counts from its stage's first step."""
    levels = [Level(value=stages[0][0], begins=0, in_tokens=False)]
    values = [value for value, _ in stages[1:]] + [full]
    for value, (_, duration) in zip(values, stages, strict=True):
        begins, in_tokens = amount(duration)
        levels.append(Level(value=value, begins=begins, in_tokens=in_tokens, from_previous=True))
    assert all(low.value <= high.value for low, high in pairwise(levels)), "discrete stages must rise"
    return tuple(levels)


def value_at(levels: Levels, *, step: int, tokens: int) -> int:
    """The value for the step before which ``step`` steps are done and ``tokens`` tokens consumed. O(log levels).

    For levels of one unit that count from the start of the run, as ``rising`` makes them.
    """
    done = tokens if levels[0].in_tokens else step
    return levels[bisect_right(levels, done, key=lambda level: level.begins) - 1].value


def amount(duration: Duration) -> tuple[int, bool]:
    """The number, and whether it counts tokens; otherwise steps."""
    return (duration.tokens, True) if duration.tokens is not None else (duration.steps or 0, False)


@dataclass(frozen=True)
class Phase:
    """From ``first_step`` on, this batch size and length; where it ends is not known yet."""

    first_step: int
    first_tokens: int
    batch_size: int
    seq_len: int

    def steps_until(self, tokens: int) -> int:
        """The first step, counted in this phase, before which ``tokens`` tokens of the run are consumed."""
        missing = max(0, tokens - self.first_tokens)
        return self.first_step + -(-missing // (self.batch_size * self.seq_len))


def phases_of(lengths: Levels, batch_sizes: Levels, *, step: int = 0, tokens: int = 0) -> list[Phase]:
    """Follow both schedules until each is on its last level; the last phase goes on without end.

    Begins at ``step``, before which ``tokens`` tokens were consumed, with the levels for that point. A level counted in
    tokens begins with the first step before which that many tokens are consumed.
    """
    phases: list[Phase] = []
    length, batch = _Position(lengths), _Position(batch_sizes)
    while True:
        length.move(step, tokens)
        batch.move(step, tokens)
        here = Phase(first_step=step, first_tokens=tokens, batch_size=batch.value, seq_len=length.value)
        if not phases or (phases[-1].batch_size, phases[-1].seq_len) != (here.batch_size, here.seq_len):
            phases.append(here)
        # Go on to the next change of either; what lies between is a number of equal steps.
        changes = [*length.next_change(here), *batch.next_change(here)]
        if not changes:
            return phases
        tokens += (min(changes) - step) * here.batch_size * here.seq_len
        step = min(changes)


class _Position:
    """Where a walk over levels is: the values that are left, and where the first of them was entered."""

    def __init__(self, levels: Levels) -> None:
        self._levels = list(levels)
        self._entered = {False: 0, True: 0}  # in steps, in tokens

    @property
    def value(self) -> int:
        return self._levels[0].value

    def move(self, step: int, tokens: int) -> None:
        """Go to the highest level that has begun."""
        while self._levels[1:] and (tokens if self._levels[1].in_tokens else step) >= self._threshold():
            self._levels.pop(0)
            self._entered = {False: step, True: tokens}

    def next_change(self, here: Phase) -> list[int]:
        """The step at which the next level begins if the run goes on as it is ``here``; none on the last level."""
        if not self._levels[1:]:
            return []
        return [here.steps_until(self._threshold()) if self._levels[1].in_tokens else self._threshold()]

    def _threshold(self) -> int:
        level = self._levels[1]
        return level.begins + (self._entered[level.in_tokens] if level.from_previous else 0)


@dataclass(frozen=True)
class Segment:
    """Consecutive steps with the same batch size and sequence length."""

    first_step: int  # 0-based step that begins the segment
    steps: int  # steps in the segment, at least 1
    batch_size: int  # sequences per step over all ranks
    seq_len: int  # tokens per sequence
    first_tokens: int  # tokens consumed before the segment
    first_samples: int  # dataset samples drawn before the segment

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.seq_len

    @property
    def end_step(self) -> int:
        """The step after the segment's last one."""
        return self.first_step + self.steps

    @property
    def end_tokens(self) -> int:
        """Tokens consumed after the segment."""
        return self.first_tokens + self.steps * self.step_tokens


def cut(phases: Sequence[Phase], duration: Duration) -> tuple[Segment, ...]:
    """The segments of a run that ends with the step that reaches ``duration``, with one sample for each sequence."""
    segments: list[Segment] = []
    samples = 0
    for index, phase in enumerate(phases):
        run_end = duration.steps if duration.steps is not None else phase.steps_until(duration.tokens or 0)
        if run_end <= phase.first_step:
            break
        is_last = index + 1 == len(phases)
        end = run_end if is_last else min(run_end, phases[index + 1].first_step)
        steps = end - phase.first_step
        segments.append(
            Segment(phase.first_step, steps, phase.batch_size, phase.seq_len, phase.first_tokens, first_samples=samples)
        )
        samples += steps * phase.batch_size
    return tuple(segments)


def segment_of(segments: Sequence[Segment], step: int) -> Segment:
    """The segment that holds ``step`` (0-based); the last one also for the steps after the run. O(log n)."""
    return segments[bisect_right(segments, step, key=lambda segment: segment.first_step) - 1]


def tokens_after(segments: Sequence[Segment], steps: int) -> int:
    """Tokens consumed after ``steps`` steps. Beyond the run, the last segment's batch goes on. O(log n)."""
    segment = segment_of(segments, steps)
    return segment.first_tokens + (steps - segment.first_step) * segment.step_tokens


def steps_to_reach(segments: Sequence[Segment], tokens: int) -> int:
    """Fewest steps after which at least ``tokens`` tokens are consumed, beyond the run as above. O(log n)."""
    if tokens <= 0:
        return 0
    segment = segments[bisect_left(segments, tokens, key=lambda segment: segment.first_tokens) - 1]
    return segment.first_step + -(-(tokens - segment.first_tokens) // segment.step_tokens)


def steps_of(duration: Duration, segments: Sequence[Segment]) -> int:
    """Steps after which ``duration`` is reached, beyond the run as above."""
    return duration.steps if duration.steps is not None else steps_to_reach(segments, duration.tokens or 0)


def samples_of_streams(batch_size: int | Ints, tokens: Ints, seq_len: int) -> Ints:
    """Samples that ``batch_size`` streams have opened when together they have read ``tokens`` tokens."""
    return batch_size * -(-(tokens // batch_size) // seq_len)


@dataclass(frozen=True)
class CycleSegments(Sequence[Segment]):
    """A run of mixed lengths as segments of one step each, made when they are asked for.

    Because the cycle repeats, tokens and samples before any step are a multiple of the cycle's plus a part of one
    cycle: a run of any number of steps costs no more memory than its cycle, and every step is found in O(log steps).
    """

    cycle: tuple[int, ...]  # lengths of one cycle's steps, in tokens
    batch_size: int  # sequences of every step
    steps: int  # steps of the run, at least 1
    # Tokens of a sample where streams read samples end to end (tail "recycle"); None: a sample per sequence.
    stream_seq_len: int | None = None

    def until(self, duration: Duration) -> "CycleSegments":
        """The same cycle up to the step that reaches ``duration``."""
        if duration.steps is not None:
            return replace(self, steps=duration.steps)
        cycles, rest = divmod(-(-(duration.tokens or 0) // self.batch_size), self._sums[-1])
        within = next(step for step, total in enumerate(self._sums) if total >= rest)
        return replace(self, steps=cycles * len(self.cycle) + within)

    @cached_property
    def _sums(self) -> tuple[int, ...]:
        """Tokens of a stream before each step of a cycle, and after the last."""
        return tuple(accumulate(self.cycle, initial=0))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Segment]:
        return (self[step] for step in range(self.steps))

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Segment, ...]: ...

    def __getitem__(self, index: int | slice) -> Segment | tuple[Segment, ...]:
        """The step ``index`` as a segment; IndexError outside the run, as of any sequence."""
        if isinstance(index, slice):
            return tuple(self[step] for step in range(self.steps)[index])
        step = range(self.steps)[index]
        cycles, rest = divmod(step, len(self.cycle))
        stream_tokens = cycles * self._sums[-1] + self._sums[rest]
        opened = step if self.stream_seq_len is None else -(-stream_tokens // self.stream_seq_len)
        return Segment(
            first_step=step,
            steps=1,
            batch_size=self.batch_size,
            seq_len=self.cycle[rest],
            first_tokens=stream_tokens * self.batch_size,
            first_samples=opened * self.batch_size,
        )


def total(durations: Sequence[Duration]) -> Duration | None:
    """The sum of durations, or None where they have different units."""
    if all(duration.steps is not None for duration in durations):
        return Duration(steps=sum(duration.steps or 0 for duration in durations))
    if all(duration.tokens is not None for duration in durations):
        return Duration(tokens=sum(duration.tokens or 0 for duration in durations))
    return None


def amounts(first: Duration, second: Duration) -> tuple[int, int] | None:
    """Both durations as numbers of their common unit; None where the units differ."""
    if first.steps is not None and second.steps is not None:
        return first.steps, second.steps
    if first.tokens is not None and second.tokens is not None:
        return first.tokens, second.tokens
    return None


def too_long(key: str, part: Duration | None, whole: Duration) -> Iterator[str]:
    """A message if ``part`` does not end within the run; in different units only a plan can tell."""
    found = amounts(part, whole) if part is not None else None
    if found and found[0] >= found[1]:
        yield f"{key} is {part}, not less than training.duration, {whole}: shorten it or lengthen the run"
