"""Loss spikes and the way back: where they begin, how high they go, and when the loss is again where it was."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.analysis.run_data import Floats


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
    finite = np.where(np.isfinite(loss), loss, np.inf)
    spikes = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        peak = start + int(np.argmax(ratio[start : end + 1]))
        level = _level_before(start, finite, smoothed, window)
        back = None if level is None else _first_at_most(finite, level, after=end)
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
    # Where there are enough, the median around the middle of the window that ends before the spike.
    level = float(smoothed[start - 1 - window // 2] if start >= window else np.median(loss[:start]))
    return level if np.isfinite(level) else None


def _first_at_most(values: Floats, level: float, *, after: int) -> int | None:
    """Index of the first value <= ``level`` behind index ``after``; None where there is none."""
    # Most spikes end soon: windows that double look at little of a long run.
    first, size = after + 1, 512
    while first < len(values):
        found = np.flatnonzero(values[first : first + size] <= level)
        if len(found):
            return first + int(found[0])
        first, size = first + size, 2 * size
    return None
