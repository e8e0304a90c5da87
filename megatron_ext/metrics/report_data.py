"""Runs as arrays for a report, and few enough points of a curve to draw it without losing a spike."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.metrics.columns import read_columns

Floats = npt.NDArray[np.float64]

_TRAIN = (
    "step",
    "tokens",
    "seq_len",
    "batch_size",
    "lr",
    "loss",
    "prefix_loss",
    "loss_ratio",
    "grad_norm",
    "step_time_s",
    "tokens_per_s",
    "adam_var_l1",
    "adam_var_max",
)
_VALID = ("step", "tokens", "loss")


@dataclass(frozen=True, eq=False)
class RunData:
    """One run: columns of its metrics, float64 [steps] and [validations]; NaN where a value is not known."""

    label: str
    """Its name in the report."""

    group: str
    """Runs of one group (a variant's seeds) share a color and a row of the table."""

    train: Mapping[str, Floats]
    """Fields of the train records, and ``seconds``: training time up to and including the step."""

    valid: Mapping[str, Floats]
    """``step``, ``tokens``, ``loss`` and ``seconds`` of the validations."""


def read_run(path: Path, *, label: str, group: str | None = None) -> RunData:
    """Read a run's metrics, also while it goes on.

    Args:
        path: The run's directory, or its metrics.jsonl.
        label: Its name in the report.
        group: By default a group of its own.

    Raises:
        UserError: there is no metrics file, it is broken, or it has no train record yet.
    """
    train = read_columns(path, _TRAIN)
    if not len(train["step"]):
        raise UserError(f"{path}: metrics.jsonl has no train record yet; wait for the run's first steps")
    train["seconds"] = np.cumsum(train["step_time_s"])
    valid = read_columns(path, _VALID, kind="eval")
    after = np.searchsorted(train["step"], valid["step"], side="right")
    valid["seconds"] = np.concatenate([[0.0], train["seconds"]])[after]
    return RunData(label=label, group=label if group is None else group, train=train, valid=valid)


def thin(x: Floats, y: Floats, bins: int) -> tuple[Floats, Floats]:
    """At most ``2 * bins + 2`` points of a curve that look the same: the extremes of each of ``bins`` columns.

    Points that are not finite are left out, and so is the inside of a stretch in which ``y`` does not change. ``x``
    does not fall. The first and the last point are always kept, and every kept point is one of the curve's.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= 2:
        return x, y
    turns = np.ones(len(y), dtype=bool)
    turns[1:-1] = (y[1:-1] != y[:-2]) | (y[1:-1] != y[2:])
    x, y = x[turns], y[turns]
    if len(x) <= 2 * bins:
        return x, y
    column = np.minimum((x - x[0]) / max(x[-1] - x[0], 1e-300) * bins, bins - 1).astype(np.int64)
    order = np.lexsort((y, column))
    ends = np.flatnonzero(np.diff(column[order], append=bins))
    starts = np.concatenate([[0], ends[:-1] + 1])
    kept = np.unique(np.concatenate([[0], order[starts], order[ends], [len(x) - 1]]))
    return x[kept], y[kept]


def sampled(x: Floats, y: Floats, points: int) -> tuple[Floats, Floats]:
    """Every so many-th point of a curve that is smooth already; points that are not finite are left out."""
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(finite) > points:
        finite = finite[np.unique(np.linspace(0, len(finite) - 1, points).round().astype(np.int64))]
    return x[finite], y[finite]
