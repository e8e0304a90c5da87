"""The table of a report: what each run, or each group of runs that differ in the seed, reached and at what cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.analysis.run_data import RunData
from megatron_ext.curriculum.guards import THRESHOLDS
from megatron_ext.text import format_count, format_duration

_NOTHING = "-"


@dataclass(frozen=True)
class RunResult:
    """What one run reached."""

    group: str
    steps: int
    tokens: float
    seconds: float
    final_loss: float
    """Loss of the last validation (nats per token); NaN without one."""

    best_loss: float
    """Lowest finite validation loss; NaN without one."""

    tokens_to_target: float
    """Tokens of training at the first validation whose loss is at most the target; NaN where there is none."""

    seconds_to_target: float
    """Seconds of training at that validation."""

    above: tuple[int, ...]
    """Steps with a loss ratio above each of THRESHOLDS."""

    largest_ratio: float
    non_finite: int
    """Steps whose loss was not finite."""


@dataclass(frozen=True)
class Comparison:
    """A table of text cells."""

    target: float
    """The validation loss (nats per token) to which tokens and time are counted; NaN where there is none."""

    target_given: bool
    """Whether the target was asked for; otherwise it is the first row's (highest) final validation loss."""

    seeds: bool
    """Whether a row may stand for several runs, and numbers are means with their spread."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, with its notes below."""
        lines = [self.headings, ("---", *("---:" for _ in self.headings[1:])), *self.rows]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([*table, "", " ".join(self.notes())])

    def notes(self) -> list[str]:
        """What the columns mean, sentence by sentence."""
        notes = ["Losses are in nats per token; time is spent in training steps, without validations and checkpoints."]
        if math.isfinite(self.target):
            which = "highest final one" if self.seeds else "final one"
            origin = "as asked for" if self.target_given else f"the {which} of {self.rows[0][0]}"
            notes.append(
                f"Target: a validation loss of {self.target:.4f}, {origin}; reached at the first validation at or "
                f"below it. Speedups are relative to {self.rows[0][0]}."
            )
        notes.append("The loss ratio is a step's training loss over the lowest of any earlier step.")
        if self.seeds:
            notes.append("Over several seeds: mean ± sample standard deviation.")
        return notes


def compare(runs: Sequence[RunData], *, target: float | None = None) -> Comparison:
    """The table of ``runs``: a row for each group, in the order in which they come.

    Args:
        runs: At least one.
        target: Validation loss to reach; by default the first run's final validation loss, or of the first group's
            seeds the highest one, so that all of them reach it.
    """
    groups = list(dict.fromkeys(run.group for run in runs))
    first = [_final_loss(run) for run in runs if run.group == groups[0]]
    # A run that diverged, or has no validation yet, sets no target.
    goal = max(filter(math.isfinite, first), default=math.nan) if target is None else target
    results = [result_of(run, goal) for run in runs]
    grouped = [[result for result in results if result.group == group] for group in groups]
    rows = [_row(members, grouped[0]) for members in grouped]
    return Comparison(
        target=goal,
        target_given=target is not None,
        seeds=any(len(members) > 1 for members in grouped),
        headings=tuple(rows[0]),
        rows=tuple(tuple(row.values()) for row in rows),
    )


def result_of(run: RunData, target: float) -> RunResult:
    """What ``run`` reached, against a target validation loss."""
    ratio, loss, valid = run.train["loss_ratio"], run.train["loss"], run.valid
    finite = valid["loss"][np.isfinite(valid["loss"])]
    reached = np.flatnonzero(valid["loss"] <= target)
    return RunResult(
        group=run.group,
        steps=int(run.train["step"][-1]),
        tokens=float(run.train["tokens"][-1]),
        seconds=float(run.train["seconds"][-1]),
        final_loss=_final_loss(run),
        best_loss=float(finite.min()) if len(finite) else math.nan,
        tokens_to_target=float(valid["tokens"][reached[0]]) if len(reached) else math.nan,
        seconds_to_target=float(valid["seconds"][reached[0]]) if len(reached) else math.nan,
        above=tuple(int((ratio > threshold).sum()) for threshold in THRESHOLDS),
        largest_ratio=float(np.max(ratio[~np.isnan(ratio)], initial=0.0)),
        non_finite=int((~np.isfinite(loss)).sum()),
    )


def _final_loss(run: RunData) -> float:
    return float(run.valid["loss"][-1]) if len(run.valid["loss"]) else math.nan


def _row(members: Sequence[RunResult], first: Sequence[RunResult]) -> dict[str, str]:
    """Heading -> cell of a group's row; speedups are against the group ``first``."""

    def plain(field: str, show: Callable[[float], str]) -> str:
        return _spread([float(getattr(member, field)) for member in members], show)

    def reaching(field: str, show: Callable[[float], str]) -> str:
        return _reached([getattr(member, field) for member in members], show)

    def speedup(field: str) -> str:
        return _speedup(*([getattr(member, field) for member in side] for side in (first, members)))

    counts = zip(*(member.above for member in members), strict=True)
    return {
        "run": members[0].group + (f" ({len(members)} seeds)" if len(members) > 1 else ""),
        "steps": plain("steps", _exact),
        "tokens": plain("tokens", format_count),
        "time": plain("seconds", format_duration),
        "final val loss": plain("final_loss", "{:.4f}".format),
        "best val loss": plain("best_loss", "{:.4f}".format),
        "tokens to target": reaching("tokens_to_target", format_count),
        "token speedup": speedup("tokens_to_target"),
        "time to target": reaching("seconds_to_target", format_duration),
        "time speedup": speedup("seconds_to_target"),
        **{
            f"ratio > {threshold:g}": _spread(count, _exact)
            for threshold, count in zip(THRESHOLDS, counts, strict=True)
        },
        "largest ratio": plain("largest_ratio", "{:.3f}".format),
        "not finite": plain("non_finite", _exact),
    }


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """One value, or mean and sample standard deviation of several."""
    if any(math.isnan(value) for value in values):
        return _NOTHING
    if len(values) == 1 or len(set(values)) == 1:
        return show(values[0])
    if not all(math.isfinite(value) for value in values):
        return "inf"
    return f"{show(float(np.mean(values)))} ± {show(float(np.std(values, ddof=1)))}"


def _reached(values: Sequence[float], show: Callable[[float], str]) -> str:
    there = [value for value in values if math.isfinite(value)]
    if len(there) == len(values):
        return _spread(values, show)
    return "not reached" if len(values) == 1 or not there else f"{len(there)} of {len(values)} seeds"


def _speedup(first: Sequence[float], other: Sequence[float]) -> str:
    """Ratio of the means; only where every run reached the target."""
    if not all(math.isfinite(value) for value in (*first, *other)) or not sum(other):
        return _NOTHING
    return f"{float(np.mean(first)) / float(np.mean(other)):.2f}x"


def _exact(count: float) -> str:
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"
