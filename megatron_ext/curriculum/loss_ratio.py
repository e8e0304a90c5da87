"""The loss ratio: training loss over the lowest training loss so far, the measure of instability of the SLW paper.

Source: Li, Zhang, He, "The Stability-Efficiency Dilemma", section 3 (NeurIPS 2022).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.errors import UserError

THRESHOLDS = (1.1, 1.2, 1.5, 2.0)
"""A step is counted once for every threshold that its ratio exceeds."""


@dataclass(frozen=True, slots=True)
class LossRatioSummary:
    """How unstable the steps so far were."""

    steps: int
    """Steps seen, those with a non-finite loss included."""

    non_finite: int
    """Steps whose loss was NaN or infinite."""

    largest: float
    """Largest ratio: infinite as soon as one loss was not finite, 1.0 before the first step."""

    above: dict[float, int]
    """Threshold -> number of steps with a ratio above it."""


class LossRatio:
    """Tracks the ratio step by step, in constant memory.

    - The ratio of a step is its loss divided by the lowest finite loss of any *earlier* step; without one it is 1.0.
      It is below 1 where the step sets a new lowest loss.
    - A loss that is NaN or infinite has the ratio infinity, and never becomes the lowest loss.
    - A lowest loss of 0 gives 1.0 for a loss of 0 and infinity for a greater one. Losses are cross-entropies: >= 0.
    """

    def __init__(self) -> None:
        self._lowest = math.inf
        self._steps = 0
        self._non_finite = 0
        self._largest = 1.0
        self._above = dict.fromkeys(THRESHOLDS, 0)

    def update(self, loss: float) -> float:
        """Count one step with this training loss (nats per token) and return its ratio."""
        ratio = self._ratio(loss)
        self._steps += 1
        self._largest = max(self._largest, ratio)
        for threshold in THRESHOLDS:
            self._above[threshold] += ratio > threshold
        if math.isfinite(loss):
            self._lowest = min(self._lowest, loss)
        else:
            self._non_finite += 1
        return ratio

    def _ratio(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.inf
        if math.isinf(self._lowest):
            return 1.0
        if self._lowest == 0.0:
            return 1.0 if loss == 0.0 else math.inf
        return loss / self._lowest

    @property
    def summary(self) -> LossRatioSummary:
        """The counts so far."""
        return LossRatioSummary(self._steps, self._non_finite, self._largest, dict(self._above))

    def state_dict(self) -> dict[str, object]:
        """Everything a resumed run needs to go on, as plain values."""
        return {
            "lowest": self._lowest,
            "steps": self._steps,
            "non_finite": self._non_finite,
            "largest": self._largest,
            "above": [[threshold, count] for threshold, count in self._above.items()],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            UserError: the state is not one of this version's (a key is missing, or the thresholds differ).
        """
        missing = sorted({"lowest", "steps", "non_finite", "largest", "above"} - state.keys())
        if missing:
            raise UserError(
                f"the checkpoint's loss ratio state lacks {', '.join(missing)}: "
                "it was written by another version; resume with that version"
            )
        above = _counts(state["above"])
        if tuple(above) != THRESHOLDS:
            raise UserError(
                f"the checkpoint's loss ratio state counts steps above {list(above)}, this version above "
                f"{list(THRESHOLDS)}: resume with the version that wrote it"
            )
        self._lowest = float(str(state["lowest"]))
        self._steps = int(str(state["steps"]))
        self._non_finite = int(str(state["non_finite"]))
        self._largest = float(str(state["largest"]))
        self._above = above


def _counts(pairs: object) -> dict[float, int]:
    assert isinstance(pairs, list), f"counts are a list of [threshold, steps], not {pairs!r}"
    return {float(threshold): int(count) for threshold, count in pairs}
