"""How unstable training was since the last decision about the length, from losses and Adam's variance.

The loss ratio is the paper's (loss over the lowest earlier loss), with two changes that make it fit for decisions:

- It is the median of the last few steps' ratios, and the lowest loss is that of medians. The ratio of single steps
  counts the noise of the data, above all in small batches, and one bad batch should not decide.
- The lowest loss is the lowest one reached at the step's length or a shorter one. Loss per token falls with the length,
  because later tokens have more context; after a step back to a shorter length, a comparison with losses at the longer
  one would show an instability that is none. While lengths only rise, this is the lowest of all earlier losses.

A loss that is not finite counts as infinite.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from megatron_ext.errors import UserError

_VARIANCES: Final = 32
"""Measurements of which the running median of the variance is taken."""

_FEWEST: Final = 8
"""Measurements without which it is not: Adam's second moment needs some steps to fill."""


@dataclass(frozen=True)
class Instability:
    """The largest values since the last decision; None where there was nothing to take them of."""

    loss_ratio: float | None
    """Median of loss over lowest earlier loss; below 1 where losses only fell."""

    variance_ratio: float | None
    """Largest element of sqrt(Adam's second moment) over its running median before."""


class InstabilityWatch:
    """Looks at every step and sums up the steps between two decisions. Plain numbers; the same in every process."""

    def __init__(self, *, smoothing: int) -> None:
        """Judge losses as the median of ``smoothing`` steps."""
        self._smoothing = smoothing
        # Of the last steps: length and loss.
        self._losses: list[tuple[int, float]] = []
        # [length, lowest median loss at it]: lengths rise and losses fall, so the last entry up to a length is the
        # lowest loss at that length or a shorter one.
        self._lowest: list[tuple[int, float]] = []
        self._variances: list[float] = []
        self._loss_ratio: float | None = None
        self._variance_ratio: float | None = None

    @property
    def seen(self) -> Instability:
        """The steps since the last decision."""
        return Instability(self._loss_ratio, self._variance_ratio)

    def observe(self, *, seq_len: int, loss: float, variance: float | None) -> None:
        """Take a step: its length in tokens, its loss, and the largest sqrt of the second moment if it was measured."""
        self._losses = [*self._losses, (seq_len, loss if math.isfinite(loss) else math.inf)][-self._smoothing :]
        if len(self._losses) == self._smoothing:
            ratio = median(_ratio(each, self._lowest_up_to(length)) for length, each in self._losses)
            self._loss_ratio = _larger(self._loss_ratio, ratio)
            smooth = median(each for _, each in self._losses)
            if math.isfinite(smooth):
                self._lower(max(length for length, _ in self._losses), smooth)
        if variance is None:
            return
        variance = variance if math.isfinite(variance) else math.inf
        if len(self._variances) >= _FEWEST:
            self._variance_ratio = _larger(self._variance_ratio, _ratio(variance, float(median(self._variances))))
        self._variances = [*self._variances, variance][-_VARIANCES:]

    def next_interval(self, *, shorter: bool) -> None:
        """Begin anew after a decision.

        Args:
            shorter: The length stepped back, and the steps that led to this shall not count again after it.
        """
        self._loss_ratio = self._variance_ratio = None
        if shorter:
            self._losses = []

    def state_dict(self) -> dict[str, Any]:
        """Everything that later ratios depend on, as JSON values (with Python's spelling of infinity)."""
        return {
            "losses": [[seq_len, loss] for seq_len, loss in self._losses],
            "lowest": [[seq_len, loss] for seq_len, loss in self._lowest],
            "variances": list(self._variances),
            "loss_ratio": self._loss_ratio,
            "variance_ratio": self._variance_ratio,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            UserError: a key is missing.
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise UserError(
                f"the checkpoint's pacing state lacks {', '.join(missing)}: it was written by another version; resume "
                "with that version"
            )
        self._losses = [(int(seq_len), float(loss)) for seq_len, loss in state["losses"]]
        self._lowest = [(int(seq_len), float(loss)) for seq_len, loss in state["lowest"]]
        self._variances = [float(variance) for variance in state["variances"]]
        self._loss_ratio, self._variance_ratio = state["loss_ratio"], state["variance_ratio"]

    def _lowest_up_to(self, seq_len: int) -> float | None:
        index = bisect_right(self._lowest, seq_len, key=_length)
        return self._lowest[index - 1][1] if index else None

    def _lower(self, seq_len: int, loss: float) -> None:
        before = self._lowest_up_to(seq_len)
        if before is not None and before <= loss:
            return
        shorter = [entry for entry in self._lowest if entry[0] < seq_len]
        longer = [entry for entry in self._lowest if entry[0] > seq_len and entry[1] < loss]
        self._lowest = [*shorter, (seq_len, loss), *longer]


def _ratio(value: float, reference: float | None) -> float:
    if reference is None or value == reference:
        return 1.0
    if math.isinf(value) or reference == 0.0:
        return math.inf
    return value / reference


def _larger(before: float | None, ratio: float) -> float:
    return ratio if before is None else max(before, ratio)


def _length(entry: tuple[int, float]) -> int:
    return entry[0]
