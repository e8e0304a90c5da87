"""Segments: a run cut into stretches of constant batch size and length, and the arithmetic of steps and tokens.

Within a segment every step trains ``batch_size * seq_len`` tokens, so both directions (tokens after a number of steps,
steps until a number of tokens) are one division after a binary search. The number of segments is that of the lengths
and batch sizes, whatever the number of steps.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_ext.base import Duration
from megatron_ext.curriculum.pacing import Ladder


@dataclass(frozen=True)
class Segment:
    """Consecutive steps with the same batch size and sequence length."""

    first_step: int
    """0-based step that begins the segment."""

    steps: int
    """Steps in the segment, at least 1."""

    batch_size: int
    """Sequences per step over all ranks."""

    seq_len: int
    """Tokens per sequence."""

    first_tokens: int
    """Tokens consumed before the segment."""

    first_samples: int
    """Dataset samples drawn before the segment."""

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


@dataclass(frozen=True)
class Stretch:
    """A segment that does not know yet where it ends: from here on, this batch size and length."""

    first_step: int
    first_tokens: int
    batch_size: int
    seq_len: int

    def steps_until(self, tokens: int) -> int:
        """The first step, counted in this stretch, before which ``tokens`` tokens of the run are consumed."""
        missing = max(0, tokens - self.first_tokens)
        return self.first_step + -(-missing // (self.batch_size * self.seq_len))


def climb(lengths: Ladder, batch_sizes: Ladder, *, step: int = 0, tokens: int = 0) -> list[Stretch]:
    """Walk both ladders until each is on its last level; the last stretch goes on without end.

    The walk begins at ``step``, before which ``tokens`` tokens were consumed, with the ladders' levels for that point.
    A level counted in tokens begins with the first step before which that many tokens are consumed.
    """
    stretches: list[Stretch] = []
    length, batch = _Climber(lengths), _Climber(batch_sizes)
    while True:
        length, batch = length.at(step, tokens), batch.at(step, tokens)
        here = Stretch(first_step=step, first_tokens=tokens, batch_size=batch.value, seq_len=length.value)
        if not stretches or (stretches[-1].batch_size, stretches[-1].seq_len) != (here.batch_size, here.seq_len):
            stretches.append(here)
        changes = [change for change in (length.next_change(here), batch.next_change(here)) if change is not None]
        if not changes:
            return stretches
        tokens += (min(changes) - step) * here.batch_size * here.seq_len
        step = min(changes)


def cut(stretches: Sequence[Stretch], duration: Duration) -> tuple[Segment, ...]:
    """The segments of a run that ends with the step that reaches ``duration``; stretches after it are dropped.

    ``first_samples`` counts one sample per sequence.
    """
    segments: list[Segment] = []
    samples = 0
    for index, stretch in enumerate(stretches):
        run_end = duration.steps if duration.steps is not None else stretch.steps_until(duration.tokens or 0)
        if run_end <= stretch.first_step:
            break
        is_last = index + 1 == len(stretches)
        end = run_end if is_last else min(run_end, stretches[index + 1].first_step)
        segments.append(
            Segment(
                first_step=stretch.first_step,
                steps=end - stretch.first_step,
                batch_size=stretch.batch_size,
                seq_len=stretch.seq_len,
                first_tokens=stretch.first_tokens,
                first_samples=samples,
            )
        )
        samples += segments[-1].steps * stretch.batch_size
    return tuple(segments)


def segment_of(segments: Sequence[Segment], step: int) -> Segment:
    """The segment that holds ``step`` (0-based); the last one also for the steps after the run. O(log n)."""
    return segments[bisect_right(segments, step, key=_first_step) - 1]


def tokens_after(segments: Sequence[Segment], steps: int) -> int:
    """Tokens consumed after ``steps`` steps. Beyond the run, the last segment's batch goes on. O(log n)."""
    segment = segment_of(segments, steps)
    return segment.first_tokens + (steps - segment.first_step) * segment.step_tokens


def steps_to_reach(segments: Sequence[Segment], tokens: int) -> int:
    """Fewest steps after which at least ``tokens`` tokens are consumed, beyond the run as above. O(log n)."""
    if tokens <= 0:
        return 0
    segment = segments[bisect_left(segments, tokens, key=_first_tokens) - 1]
    return segment.first_step + -(-(tokens - segment.first_tokens) // segment.step_tokens)


def _first_step(segment: Segment) -> int:
    return segment.first_step


def _first_tokens(segment: Segment) -> int:
    return segment.first_tokens


@dataclass(frozen=True)
class _Climber:
    """A place on a ladder, and where its level was entered."""

    ladder: Ladder
    index: int = 0
    entered_step: int = 0
    entered_tokens: int = 0

    @property
    def value(self) -> int:
        return self.ladder[self.index].value

    def at(self, step: int, tokens: int) -> "_Climber":
        """The same climber at a later point of the run: on the highest level that has begun."""
        climber = self
        for index in self._levels_above():
            threshold, in_tokens = climber._threshold(index)
            if (tokens if in_tokens else step) < threshold:
                break
            climber = replace(climber, index=index, entered_step=step, entered_tokens=tokens)
        return climber

    def next_change(self, here: Stretch) -> int | None:
        """The step at which the next level begins if the run goes on as it is ``here``; None on the last level."""
        for index in self._levels_above():
            threshold, in_tokens = self._threshold(index)
            return here.steps_until(threshold) if in_tokens else threshold
        return None

    def _levels_above(self) -> Iterator[int]:
        return iter(range(self.index + 1, len(self.ladder)))

    def _threshold(self, index: int) -> tuple[int, bool]:
        level = self.ladder[index]
        if not level.from_previous:
            return level.begins, level.in_tokens
        return level.begins + (self.entered_tokens if level.in_tokens else self.entered_step), level.in_tokens
