"""Loss spikes and the way back: where they begin, how high they go, and when the loss is again where it was."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.analysis.run_data import Floats

_BLOCK = 512


@dataclass(frozen=True)
class StepPoint:
    """A finished step, and the tokens consumed by then."""

    step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Spike:
    """Consecutive steps with a loss ratio above a threshold, and what came after."""

    start: StepPoint
    """First step above the threshold."""

    end: StepPoint
    """Last step above it."""

    steps: int
    """From start to end, both included, with the steps below the threshold that were too few to end the spike."""

    peak_ratio: float
    peak: StepPoint

    level: float | None
    """Median loss of the steps just before the start; None where the file begins with the spike, or where most of
    those losses were not finite."""

    recovered: StepPoint | None
    """First step after the end whose loss is at most ``level``; None where there is none."""

    recovery_steps: int | None
    """Steps after the start up to ``recovered``, that one included."""

    recovery_tokens: int | None
    """Tokens of those steps."""


def find_spikes(
    ratio: Floats,
    loss: Floats,
    smoothed: Floats,
    *,
    place: Callable[[int], StepPoint],
    threshold: float,
    merge_gap: int,
    window: int,
) -> tuple[Spike, ...]:
    """Spikes of a run, in order.

    Args:
        ratio: Loss ratio [steps].
        loss: Loss [steps].
        smoothed: Running median of the loss [steps] over ``window`` steps around each.
        place: Index of a step to its place.
        threshold: A step belongs to a spike where its ratio is above this.
        merge_gap: Spikes with at most this many steps between them are one.
        window: Steps before a spike whose median is the level to come back to; fewer where there are fewer.
    """
    above = np.flatnonzero(ratio > threshold)
    if not len(above):
        return ()
    breaks = np.flatnonzero(np.diff(above) > merge_gap + 1)
    starts = above[np.concatenate(([0], breaks + 1))]
    ends = above[np.concatenate((breaks, [len(above) - 1]))]
    first_at_most = _FirstAtMost(loss)
    spikes = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        peak = start + int(np.argmax(ratio[start : end + 1]))
        level = _level_before(start, loss, smoothed, window)
        back = None if level is None else first_at_most.find(level, after=end)
        begin = place(start)
        recovered = None if back is None else place(back)
        spikes.append(
            Spike(
                start=begin,
                end=place(end),
                steps=place(end).step - begin.step + 1,
                peak_ratio=float(ratio[peak]),
                peak=place(peak),
                level=level,
                recovered=recovered,
                recovery_steps=None if recovered is None else recovered.step - begin.step,
                recovery_tokens=None if recovered is None else recovered.tokens - begin.tokens,
            )
        )
    return tuple(spikes)


def _level_before(start: int, loss: Floats, smoothed: Floats, window: int) -> float | None:
    if start == 0:
        return None
    if start >= window:
        # The median around the middle of the window that ends before the spike.
        level = float(smoothed[start - 1 - window // 2])
    else:
        before = loss[:start]
        level = float(np.median(np.where(np.isfinite(before), before, np.inf)))
    return level if np.isfinite(level) else None


class _FirstAtMost:
    """Finds the first value at most as high as a level, in blocks that are skipped by their minimum."""

    def __init__(self, values: Floats) -> None:
        finite = np.where(np.isfinite(values), values, np.inf)
        self._values = finite
        blocks = np.arange(0, len(values), _BLOCK)
        self._lowest = np.minimum.reduceat(finite, blocks)
        self._lowest_from = np.minimum.accumulate(self._lowest[::-1])[::-1]

    def find(self, level: float, *, after: int) -> int | None:
        """Index of the first value <= ``level`` behind index ``after``; None where there is none."""
        first = after + 1
        block = first // _BLOCK
        found = self._in(first, (block + 1) * _BLOCK, level)
        if found is not None:
            return found
        rest = self._lowest[block + 1 :]
        if not len(rest) or self._lowest_from[block + 1] > level:
            return None
        block += 1 + int(np.argmax(rest <= level))
        return self._in(block * _BLOCK, (block + 1) * _BLOCK, level)

    def _in(self, first: int, end: int, level: float) -> int | None:
        within = np.flatnonzero(self._values[first:end] <= level)
        return first + int(within[0]) if len(within) else None
