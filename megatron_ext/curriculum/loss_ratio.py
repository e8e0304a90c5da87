"""The loss ratio: training loss over the lowest training loss so far, the measure of instability of the SLW paper.

Source: Li, Zhang, He, "The Stability-Efficiency Dilemma", section 3 (NeurIPS 2022).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.errors import UserError

THRESHOLDS = (1.1, 1.2, 1.5, 2.0)
"""A step is counted once for every threshold that its ratio exceeds."""


@dataclass(slots=True)
class LossRatio:
    """Tracks the ratio step by step, in constant memory; its fields are to be read, not set.

    - The ratio of a step is its loss divided by the lowest finite loss of any *earlier* step; without one it is 1.0.
      It is below 1 where the step sets a new lowest loss.
    - A loss that is NaN or infinite has the ratio infinity, and never becomes the lowest loss.
    - A lowest loss of 0 gives 1.0 for a loss of 0 and infinity for a greater one. Losses are cross-entropies: >= 0.
    """

    lowest: float = math.inf
    """Lowest finite loss; infinite before there is one."""

    steps: int = 0
    """Steps seen, those with a non-finite loss included."""

    non_finite: int = 0
    """Steps whose loss was NaN or infinite."""

    largest: float = 1.0
    """Largest ratio: infinite as soon as one loss was not finite."""

    above: dict[float, int] = field(default_factory=lambda: dict.fromkeys(THRESHOLDS, 0))
    """Threshold -> number of steps with a ratio above it."""

    def update(self, loss: float) -> float:
        """Count one step with this training loss (nats per token) and return its ratio."""
        ratio = self._ratio(loss)
        self.steps += 1
        self.largest = max(self.largest, ratio)
        for threshold in THRESHOLDS:
            self.above[threshold] += ratio > threshold
        if math.isfinite(loss):
            self.lowest = min(self.lowest, loss)
        else:
            self.non_finite += 1
        return ratio

    def _ratio(self, loss: float) -> float:
        if not math.isfinite(loss):
            return math.inf
        if math.isinf(self.lowest):
            return 1.0
        if self.lowest == 0.0:
            return 1.0 if loss == 0.0 else math.inf
        return loss / self.lowest

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on, as plain values."""
        return {
            "lowest": self.lowest,
            "steps": self.steps,
            "non_finite": self.non_finite,
            "largest": self.largest,
            "above": [[threshold, count] for threshold, count in self.above.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises UserError if the state is not one of this version's (a key is missing, or the thresholds differ).
        """
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise UserError(
                f"the checkpoint's loss ratio state lacks {', '.join(missing)}: "
                "it was written by another version; resume with that version"
            )
        above = {float(threshold): int(count) for threshold, count in state["above"]}
        if tuple(above) != THRESHOLDS:
            raise UserError(
                f"the checkpoint's loss ratio state counts steps above {list(above)}, this version above "
                f"{list(THRESHOLDS)}: resume with the version that wrote it"
            )
        self.lowest = float(state["lowest"])
        self.steps = int(state["steps"])
        self.non_finite = int(state["non_finite"])
        self.largest = float(state["largest"])
        self.above = above
