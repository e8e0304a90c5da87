"""Mixed lengths: a fixed cycle of steps, each of one length, repeated to the end of the run.

The cycle holds every length equally often, in an order that the seed shuffles. Because it repeats, tokens and samples
before any step are a multiple of the cycle's plus a part of one cycle: closed forms, so a run of any number of steps
costs no more memory than its cycle, and every step is found in O(log steps).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

from megatron_ext.base import Duration
from megatron_ext.config.curriculum import MixedPacing
from megatron_ext.curriculum.segments import Segment


def cycle_of(curriculum: MixedPacing, seed: int) -> tuple[int, ...]:
    """Lengths of one cycle's steps, in tokens: each of the curriculum's lengths ``per_cycle`` times.

    The order is that of the SHA-256 of seed and position: the same under every version of every library, which a
    random generator's is not.
    """
    lengths = [length for length in curriculum.lengths for _ in range(curriculum.per_cycle)]
    return tuple(length for _, length in sorted((_key(seed, place), length) for place, length in enumerate(lengths)))


def _key(seed: int, place: int) -> bytes:
    return hashlib.sha256(f"mixed lengths {seed} {place}".encode()).digest()


@dataclass(frozen=True)
class CycleSegments(Sequence[Segment]):
    """A run of mixed lengths as a sequence of segments of one step each, made when they are asked for."""

    cycle: tuple[int, ...]
    """Lengths of one cycle's steps, in tokens."""

    batch_size: int
    """Sequences of every step."""

    steps: int
    """Steps of the run, at least 1."""

    lane_seq_len: int | None = None
    """Tokens of a sample where lanes read samples end to end (``tail: "recycle"``); None: a sample per sequence."""

    @classmethod
    def until(
        cls, duration: Duration, *, cycle: tuple[int, ...], batch_size: int, lane_seq_len: int | None
    ) -> "CycleSegments":
        """The run that ends with the step that reaches ``duration``."""
        endless = cls(cycle=cycle, batch_size=batch_size, steps=1, lane_seq_len=lane_seq_len)
        steps = duration.steps if duration.steps is not None else endless._steps_to_reach(duration.tokens or 0)
        return cls(cycle=cycle, batch_size=batch_size, steps=steps, lane_seq_len=lane_seq_len)

    @cached_property
    def _sums(self) -> tuple[int, ...]:
        """Tokens of a lane before each step of a cycle, and after the last."""
        return tuple(accumulate(self.cycle, initial=0))

    def _lane_tokens(self, step: int) -> int:
        cycles, rest = divmod(step, len(self.cycle))
        return cycles * self._sums[-1] + self._sums[rest]

    def _steps_to_reach(self, tokens: int) -> int:
        lane_tokens = -(-tokens // self.batch_size)
        cycles, rest = divmod(lane_tokens, self._sums[-1])
        return cycles * len(self.cycle) + next(step for step, total in enumerate(self._sums) if total >= rest)

    def __len__(self) -> int:
        return self.steps

    @overload
    def __getitem__(self, index: int) -> Segment: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Segment, ...]: ...

    def __getitem__(self, index: int | slice) -> Segment | tuple[Segment, ...]:
        """The step ``index`` as a segment; IndexError outside the run, as of any sequence."""
        if isinstance(index, slice):
            return tuple(self[step] for step in range(self.steps)[index])
        step = range(self.steps)[index]
        lane_tokens = self._lane_tokens(step)
        opened = step if self.lane_seq_len is None else -(-lane_tokens // self.lane_seq_len)
        return Segment(
            first_step=step,
            steps=1,
            batch_size=self.batch_size,
            seq_len=self.cycle[step % len(self.cycle)],
            first_tokens=lane_tokens * self.batch_size,
            first_samples=opened * self.batch_size,
        )
