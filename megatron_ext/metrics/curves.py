"""A run as arrays for the picture, and smoothing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_ext.metrics.jsonl import Metrics

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curves:
    """A run as arrays, one element a step: [steps] for training, [validations] for validation."""

    label: str
    tokens: Floats
    seconds: Floats
    """Training time up to and including the step."""
    loss: Floats
    seq_len: Floats
    lr: Floats
    valid_tokens: Floats
    valid_seconds: Floats
    valid_loss: Floats
    resume_tokens: Floats
    """Tokens at which the run was resumed."""


def curves_of(metrics: Metrics, label: str) -> Curves:
    """The arrays of a run; validations and resumes are placed by their step.

    Args:
        metrics: a run with at least one train record.
        label: its name in the legend.
    """
    train, valid = metrics.train, metrics.evaluations
    steps = np.array([record.step for record in train], dtype=np.int64)
    tokens = np.array([record.tokens for record in train], dtype=np.float64)
    seconds = np.cumsum([record.step_time_s for record in train], dtype=np.float64)
    resumed = [event.details.get("step") for event in metrics.events if event.name == "resume"]
    resume_steps = np.array([step for step in resumed if isinstance(step, int)], dtype=np.int64)
    return Curves(
        label=label,
        tokens=tokens,
        seconds=seconds,
        loss=np.array([record.loss for record in train], dtype=np.float64),
        seq_len=np.array([record.seq_len for record in train], dtype=np.float64),
        lr=np.array([record.lr for record in train], dtype=np.float64),
        valid_tokens=np.array([record.tokens for record in valid], dtype=np.float64),
        valid_seconds=_value_after(seconds, steps, np.array([record.step for record in valid], dtype=np.int64)),
        valid_loss=np.array([record.loss for record in valid], dtype=np.float64),
        resume_tokens=_value_after(tokens, steps, resume_steps),
    )


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


def _value_after(values: Floats, steps: NDArray[np.int64], at: NDArray[np.int64]) -> Floats:
    """The value of the last step up to each of `at`; 0 before the first."""
    index = np.searchsorted(steps, at, side="right")
    return np.concatenate([[0.0], values])[index]
