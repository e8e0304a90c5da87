"""What was read of a run, as arrays; smoothing, and few enough points of a curve to draw it without losing a spike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.metrics.reading import read_columns, read_events

Floats = npt.NDArray[np.float64]

_TRAIN = (
    *("step", "tokens", "seq_len", "batch_size", "lr", "loss", "prefix_loss", "loss_ratio", "grad_norm"),
    *("step_time_s", "tokens_per_s", "adam_var_l1", "adam_var_max", "peak_memory_bytes"),
)
_VALID = ("step", "tokens", "loss")


@dataclass(frozen=True, eq=False, kw_only=True)
class RunData:
    """One run: columns of its metrics, float64 [steps], [validations] and [resumes]; NaN where a value is not known."""

    label: str
    """Its name in the report."""

    group: str
    """Runs of one group (a variant's seeds) share a color and a row of the table."""

    train: Mapping[str, Floats]
    """Fields of the train records, ``seconds`` (training time up to and including the step), ``peak_memory_gib``."""

    valid: Mapping[str, Floats]
    """``step``, ``tokens``, ``loss`` and ``seconds`` of the validations."""

    resume_tokens: Floats
    """Tokens consumed when the run was resumed."""


def read_train(path: Path, names: Sequence[str]) -> dict[str, Floats]:
    """Columns of a run's train records, at least one.

    Raises:
        UserError: there is no metrics file, it is broken, or it has no train record yet.
    """
    train = read_columns(path, names)
    if not len(train["step"]):
        raise UserError(f"{path}: metrics.jsonl has no train record yet; wait for the run's first steps")
    return train


def read_run(path: Path, *, label: str, group: str | None = None) -> RunData:
    """Read a run's metrics, also while it goes on; errors as of ``read_train``.

    Args:
        path: The run's directory, or its metrics.jsonl.
        label: Its name in the report.
        group: By default a group of its own.
    """
    train = read_train(path, _TRAIN)
    train["seconds"] = np.cumsum(train["step_time_s"])
    train["peak_memory_gib"] = train.pop("peak_memory_bytes") / 2**30
    valid = read_columns(path, _VALID, kind="eval")
    valid["seconds"] = _value_after(train, "seconds", valid["step"])
    resumed = [event.details.get("step") for event in read_events(path) if event.name == "resume"]
    steps = np.array([step for step in resumed if isinstance(step, int)], dtype=np.float64)
    return RunData(
        label=label,
        group=label if group is None else group,
        train=train,
        valid=valid,
        resume_tokens=_value_after(train, "tokens", steps),
    )


def _value_after(train: Mapping[str, Floats], name: str, steps: Floats) -> Floats:
    """A train column at the last step up to each of ``steps``; 0 before the first."""
    return np.concatenate([[0.0], train[name]])[np.searchsorted(train["step"], steps, side="right")]


def smooth(values: Floats, *, half_width: int) -> Floats:
    """Mean of each value and its up to `half_width` neighbors on both sides, the nearer ones weighing more.

    The window is centered, and symmetric at the ends too: unlike a running mean it does not lag behind a falling loss.
    Values that are not finite are left out of the means, and are NaN in the result: the line has a gap there.
    """
    # Two flat windows in a row make one with linearly falling weights, which gives a spike no flat top.
    return _flat_mean(_flat_mean(values, half_width // 2), half_width - half_width // 2)


def _flat_mean(values: Floats, half_width: int) -> Floats:
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    half = np.minimum(half_width, np.minimum(index, len(values) - 1 - index))
    first, end = index - half, index + half + 1
    means = (sums[end] - sums[first]) / np.maximum(1, counts[end] - counts[first])
    return np.where(finite, means, np.nan)


def thin(x: Floats, y: Floats, bins: int) -> tuple[Floats, Floats]:
    """At most ``2 * bins + 2`` points of a curve that look the same: the extremes of each of ``bins`` columns.

    Points that are not finite are left out, and so are those between two of the same ``y``. ``x``
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
