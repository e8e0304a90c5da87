"""How unstable a run was, from its recorded steps: thresholds, variance, their correlation. Arrays in, values out.

Source of the measures: Li, Zhang, He, "The Stability-Efficiency Dilemma", section 3 (NeurIPS 2022).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import median_filter

from megatron_ext.analysis.run_data import Floats, read_train
from megatron_ext.curriculum.guards import THRESHOLDS
from megatron_ext.errors import UserError

_MEASURES = ("adam_var_l1", "adam_var_max")
_FEWEST = 3
"""Points from which a correlation says anything: two always lie on a line."""


@dataclass(frozen=True)
class StepPoint:
    """A finished step, and the tokens consumed by then."""

    step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The recorded steps as columns [steps], in order, each step once."""

    step: Floats
    tokens: Floats
    """Consumed, the step's own included."""

    loss: Floats
    """NaN or infinite where it was not finite."""

    ratio: Floats
    """Loss over the lowest loss of any earlier step; infinite where the loss was not finite."""

    variance: Mapping[str, Floats]
    """Measures of Adam's second moment by name; NaN on steps where they were not measured."""

    @classmethod
    def read(cls, path: Path, *, from_step: int = 1) -> "Steps":
        """From a metrics file, or a run's directory that holds one; the steps from ``from_step`` on.

        Raises:
            UserError: the file is missing or broken, or has no train record of that step or a later one.
        """
        columns = read_train(path, ("step", "tokens", "loss", "loss_ratio", *_MEASURES))
        last = int(columns["step"].max())
        if from_step > last:
            raise UserError(f"--from-step is {from_step}, and the last step in {path} is {last}: write at most {last}")
        return cls.from_columns(columns, _MEASURES, from_step=from_step)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Floats], measures: Sequence[str], *, from_step: int = 1) -> "Steps":
        """From columns ``step``, ``tokens``, ``loss``, ``loss_ratio`` and ``measures`` as a metrics file holds them.

        Of a step that is there twice the later line counts. The recorded loss ratio knows of steps that the file may
        lack; where it is not recorded it is computed from the steps that are there.
        """
        # np.unique keeps the first of equal steps, so the order is turned round.
        _, last = np.unique(columns["step"][::-1], return_index=True)
        kept = {name: column[::-1][last] for name, column in columns.items()}
        kept["loss_ratio"] = np.where(np.isnan(kept["loss_ratio"]), loss_ratios(kept["loss"]), kept["loss_ratio"])
        kept = {name: column[kept["step"] >= from_step] for name, column in kept.items()}
        step, tokens, loss, ratio = (kept[name] for name in ("step", "tokens", "loss", "loss_ratio"))
        return cls(step=step, tokens=tokens, loss=loss, ratio=ratio, variance={name: kept[name] for name in measures})

    def place(self, index: int) -> StepPoint:
        """Where a step is."""
        return StepPoint(step=int(self.step[index]), tokens=int(self.tokens[index]))


@dataclass(frozen=True)
class ThresholdRow:
    """Steps with a loss ratio above a threshold."""

    threshold: float
    count: int
    share: float
    """Of all steps, 0..1."""

    first: StepPoint | None
    last: StepPoint | None


@dataclass(frozen=True)
class RatioTable:
    """Loss ratios of a run."""

    largest: float
    at: StepPoint
    rows: tuple[ThresholdRow, ...]


@dataclass(frozen=True)
class Reading:
    """A measured value and where it was."""

    value: float
    at: StepPoint


@dataclass(frozen=True)
class MeasureSummary:
    """One measure of Adam's second moment over the run."""

    measure: str
    measured: int
    """Steps on which it was measured."""

    first: Reading
    min: Reading
    max: Reading
    last: Reading


@dataclass(frozen=True)
class Correlation:
    """Pearson's r between the loss ratio and a variance measure on the steps where it was measured."""

    measure: str
    smoothed: bool
    """Whether the ratio is that of the smoothed loss."""

    n: int
    """Steps with both values finite."""

    r: float | None
    p: float | None
    """Of r = 0, two-sided, for normal values."""

    undefined: str | None
    """Why there is no r."""


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


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What `analyze` tells about a run."""

    steps: int
    first: StepPoint
    last: StepPoint
    missing_steps: int
    """Steps between the first and the last that the file does not hold."""

    non_finite_losses: int
    ratio: RatioTable
    window: int
    """Steps of the running median behind ``smoothed_ratio``."""

    smoothed_ratio: RatioTable
    variance: tuple[MeasureSummary, ...]
    """Of the measures that the run recorded."""

    correlations: tuple[Correlation, ...]
    spike_threshold: float
    spikes: tuple[Spike, ...]


@dataclass(frozen=True, kw_only=True)
class AnalysisSettings:
    """What is counted, and how."""

    thresholds: tuple[float, ...] = THRESHOLDS
    spike_threshold: float = 1.2
    merge_gap: int = 10
    """Spikes with at most this many steps between them are one."""

    window: int = 11
    """Steps of the running median; odd."""


def analyze(steps: Steps, settings: AnalysisSettings) -> Analysis:
    """Measure the instability of a run of at least one step."""
    assert len(steps.step), "there is something to analyze"
    smoothed = running_median(steps.loss, settings.window)
    smoothed_ratio = loss_ratios(smoothed)
    ratios = {False: steps.ratio, True: smoothed_ratio}
    return Analysis(
        steps=len(steps.step),
        first=steps.place(0),
        last=steps.place(-1),
        missing_steps=int(steps.step[-1] - steps.step[0]) + 1 - len(steps.step),
        non_finite_losses=int(np.sum(~np.isfinite(steps.loss))),
        ratio=ratio_table(steps, steps.ratio, settings.thresholds),
        window=settings.window,
        smoothed_ratio=ratio_table(steps, smoothed_ratio, settings.thresholds),
        variance=tuple(summary for name in steps.variance if (summary := measure_summary(steps, name)) is not None),
        correlations=tuple(
            correlation(ratio, values, measure=name, smoothed=is_smoothed)
            for name, values in steps.variance.items()
            for is_smoothed, ratio in ratios.items()
        ),
        spike_threshold=settings.spike_threshold,
        spikes=find_spikes(steps, smoothed, settings),
    )


def find_spikes(steps: Steps, smoothed: Floats, settings: AnalysisSettings) -> tuple[Spike, ...]:
    """Spikes of a run, in order; ``smoothed`` [steps] is the running median of the loss over ``settings.window``."""
    above = np.flatnonzero(steps.ratio > settings.spike_threshold)
    if not len(above):
        return ()
    breaks = np.flatnonzero(np.diff(above) > settings.merge_gap + 1)
    starts, ends = above[np.append(0, breaks + 1)], above[np.append(breaks, len(above) - 1)]
    loss = np.where(np.isfinite(steps.loss), steps.loss, np.inf)
    spikes = []
    for first, last in zip(starts.tolist(), ends.tolist(), strict=True):
        peak = first + int(np.argmax(steps.ratio[first : last + 1]))
        level = _level_before(first, loss, smoothed, settings.window)
        back = None if level is None else _first_at_most(loss, level, after=last)
        start, end, recovered = steps.place(first), steps.place(last), None if back is None else steps.place(back)
        spikes.append(
            Spike(
                start=start,
                end=end,
                steps=end.step - start.step + 1,
                peak_ratio=float(steps.ratio[peak]),
                peak=steps.place(peak),
                level=level,
                recovered=recovered,
                recovery_steps=None if recovered is None else recovered.step - start.step,
                recovery_tokens=None if recovered is None else recovered.tokens - start.tokens,
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


def loss_ratios(loss: Floats) -> Floats:
    """The loss ratio of every step, as `LossRatio` gives it step by step."""
    finite = np.where(np.isfinite(loss), loss, np.inf)
    lowest = np.minimum.accumulate(np.concatenate(([np.inf], finite)))[:-1]
    ratio = np.ones_like(finite)
    known = np.isfinite(lowest) & (lowest != 0)
    np.divide(finite, lowest, out=ratio, where=known)
    ratio[(lowest == 0) & (finite != 0)] = np.inf
    ratio[~np.isfinite(loss)] = np.inf
    return ratio


def running_median(values: Floats, window: int) -> Floats:
    """Median of ``window`` (odd) values around each; near the ends of as many as there are on both sides.

    A value that is not finite counts as infinite.
    """
    assert window % 2 == 1, "a window has a middle"
    finite = np.where(np.isfinite(values), values, np.inf)
    half = min(window // 2, (len(values) - 1) // 2)
    result: Floats = median_filter(finite, size=2 * half + 1)
    for index in range(half):
        result[index] = np.median(finite[: 2 * index + 1])
        result[-1 - index] = np.median(finite[len(values) - 2 * index - 1 :])
    return result


def ratio_table(steps: Steps, ratio: Floats, thresholds: Sequence[float]) -> RatioTable:
    """Count the steps above each threshold; a ratio equal to one is not above it."""
    rows = []
    for threshold in thresholds:
        above = np.flatnonzero(ratio > threshold)
        ends = (steps.place(above[0]), steps.place(above[-1])) if len(above) else (None, None)
        rows.append(ThresholdRow(threshold, len(above), len(above) / len(ratio), *ends))
    largest = int(np.argmax(ratio))
    return RatioTable(largest=float(ratio[largest]), at=steps.place(largest), rows=tuple(rows))


def measure_summary(steps: Steps, measure: str) -> MeasureSummary | None:
    """First, smallest, largest and last value of a measure; None where it was never measured."""
    values = steps.variance[measure]
    measured = np.flatnonzero(~np.isnan(values))
    if not len(measured):
        return None

    def reading(index: int) -> Reading:
        return Reading(value=float(values[index]), at=steps.place(index))

    return MeasureSummary(
        measure=measure,
        measured=len(measured),
        first=reading(measured[0]),
        min=reading(measured[np.argmin(values[measured])]),
        max=reading(measured[np.argmax(values[measured])]),
        last=reading(measured[-1]),
    )


def correlation(ratio: Floats, values: Floats, *, measure: str, smoothed: bool) -> Correlation:
    """Pearson's r between ``ratio`` and the measured ``values`` ([steps]), with the reason where there is none."""
    measured = ~np.isnan(values)
    both = np.isfinite(ratio) & np.isfinite(values)
    n = int(both.sum())
    reason = None
    if not measured.any():
        reason = "it was never measured"
    elif n < _FEWEST:
        reason = f"only {n} of {int(measured.sum())} measured steps have finite values, it takes {_FEWEST}"
    else:
        for name, column in (("the loss ratio", ratio[both]), (measure, values[both])):
            # To rounding: differences in the last digits of a constant correlate with anything.
            if np.ptp(column) <= 1e-13 * np.abs(column).max():
                reason = f"{name} has the same value on all {n} steps"
    if reason is not None:
        return Correlation(measure, smoothed, n, None, None, reason)
    # Takes half a second to import, which a run without measured variance does not need.
    from scipy.stats import pearsonr

    r, p = pearsonr(ratio[both], values[both])
    return Correlation(measure, smoothed, n, float(r), float(p), None)
