"""The loss ratio, the measure of instability of the SLW paper, and guards on it.

The ratio is the training loss over the lowest training loss so far (Li, Zhang, He, "The Stability-Efficiency Dilemma",
NeurIPS 2022, section 3). Guards decide between a step's gradient and its update what to do about a loss that rises or
is no number.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_ext.base import Duration, NonNegativeInt, PositiveInt, Section
from megatron_ext.errors import RunStopped, UserError

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

    lowest: float = math.inf  # lowest finite loss; infinite before there is one
    steps: int = 0  # steps seen, those with a non-finite loss included
    non_finite: int = 0  # steps whose loss was NaN or infinite
    largest: float = 1.0  # largest ratio: infinite as soon as one loss was not finite
    # Threshold -> number of steps with a ratio above it.
    above: dict[float, int] = field(default_factory=lambda: dict.fromkeys(THRESHOLDS, 0))

    def update(self, loss: float) -> float:
        """Count one step with this training loss (nats per token) and return its ratio."""
        ratio = math.inf
        if math.isfinite(loss):
            ratio = ratio_to(loss, self.lowest if self.lowest < math.inf else None)
        self.steps += 1
        self.largest = max(self.largest, ratio)
        for threshold in THRESHOLDS:
            self.above[threshold] += ratio > threshold
        if math.isfinite(loss):
            self.lowest = min(self.lowest, loss)
        else:
            self.non_finite += 1
        return ratio

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
        """Go on from what ``state_dict`` returned. Raises UserError if that is no state of this version's."""
        check_complete(state, self.state_dict(), "loss ratio")
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


def ratio_to(value: float, reference: float | None) -> float:
    """``value`` over ``reference``, both >= 0: 1 without a reference or to an equal one, infinite to 0."""
    if reference is None or value == reference:
        return 1.0
    if math.isinf(value) or reference == 0.0:
        return math.inf
    return value / reference


def check_complete(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise UserError where the state of ``what``, from a checkpoint, lacks a key of the ``expected`` one."""
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise UserError(
            f"the checkpoint's {what} state lacks {', '.join(missing)}: it was written by another version; resume "
            "with that version"
        )


GuardAction = Literal["log", "stop", "skip", "rollback"]
"""Described at ``LossRatioGuard.action``."""


class LossRatioGuard(Section):
    """An incident is a loss ratio that stays high."""

    above: Annotated[float, Field(gt=1)]
    """Loss ratio (training loss over the lowest loss of any earlier step) beyond which a step counts."""

    steps: PositiveInt = 1
    """Consecutive steps that make an incident; with small batches, whose loss is noisy, more than one."""

    action: GuardAction
    """What is done about it, from the last of these steps on. log: an event, nothing else. stop: leave out the step's
    update, save a checkpoint, end the run with exit status 1. skip: leave out the step's update and go on. rollback:
    load the last checkpoint from before the incident and go on from there with other samples."""


class GuardsConfig(Section):
    """Checks between a step's gradient and its update. A guard that is on makes the host wait for every step."""

    loss_ratio: LossRatioGuard | None = None
    """Guard against a loss ratio that stays high; null: off."""

    non_finite: GuardAction | None = None
    """What is done at once (as ``loss_ratio.action`` says) where the loss or the gradient is NaN or infinite (an
    overflow of fp16, which its loss scale deals with, is none); null: off."""

    max_skips: PositiveInt = 10
    """After this many skipped updates in a row the run stops instead."""

    max_rollbacks: PositiveInt = 3
    """After this many rollbacks in the whole run it stops instead."""

    max_non_finite: PositiveInt = 20
    """An update with a gradient that is NaN or infinite is always left out; after this many in a row the run stops with
    exit status 1 (with ``non_finite`` null or log; the other actions have limits of their own)."""

    check_copies_every: NonNegativeInt = 0
    """Steps between comparisons, bit for bit, of the weights that several ranks hold; a difference, which only faulty
    hardware makes, ends the run with exit status 1. 0: never."""

    @property
    def are_on(self) -> bool:
        """Whether any guard is on."""
        return self.loss_ratio is not None or self.non_finite is not None

    @property
    def rolls_back(self) -> bool:
        """Whether any guard rolls back."""
        return self.non_finite == "rollback" or (self.loss_ratio is not None and self.loss_ratio.action == "rollback")

    def problems(self, *, checkpoint_every: Duration | None, keep_last: int) -> Iterator[str]:
        """One line per reason for which a rollback would find no checkpoint from before the incident."""
        if not self.rolls_back:
            return
        if checkpoint_every is None:
            key = "guards.non_finite" if self.non_finite == "rollback" else "guards.loss_ratio.action"
            yield (
                f'{key} is "rollback" and checkpoint.every null, so that there is nothing to go back to before the '
                'end: write checkpoint.every, for example {"steps": 100}'
            )
            return
        ratio = self.loss_ratio
        if ratio is None or ratio.action != "rollback":
            return
        # An incident is seen when ``steps`` steps are bad, and checkpoints may be due after all of them but the last.
        within = -(-(ratio.steps - 1) // (checkpoint_every.steps or ratio.steps))
        if keep_last <= within:
            yield (
                f"checkpoint.keep_last is {keep_last} with guards.loss_ratio.steps {ratio.steps} and "
                f"checkpoint.every {checkpoint_every}: checkpoints from within an incident may be all that is left "
                f"when it is seen; write checkpoint.keep_last {within + 1} or more"
            )


Reason = Literal["loss", "gradient", "loss_ratio"]


class GuardStop(RunStopped):
    """A guard ended the run; the message says why and what is left. Exit status 1, without a traceback."""


@dataclass(frozen=True, slots=True)
class Incident:
    """What went wrong with a step and what is done about it: but for "log", its update is left out."""

    action: GuardAction
    # loss, gradient: it is not finite. loss_ratio: it was above the threshold.
    reason: Reason
    value: float  # the loss, the gradient norm or the loss ratio of the step
    steps: int  # consecutive steps that make up the incident so far, this one included
    limit: str | None = None  # why the run stops although the action asked for is another one
    # Whether a stop saves a checkpoint. Not where rollbacks were of no use: the newest checkpoint is then still one
    # from before the incident.
    saves: bool = True

    @property
    def why(self) -> str:
        """In words, for people."""
        what = {"loss": "the loss", "gradient": "the gradient", "loss_ratio": "loss ratio"}[self.reason]
        if self.reason != "loss_ratio":
            return f"{what} is not finite"
        steps = "1 step" if self.steps == 1 else f"{self.steps:,} steps in a row"
        return f"{what} {self.value:.4g} after {steps} above guards.loss_ratio.above"

    def details(self) -> dict[str, object]:
        """What the event in the metrics says, beside step and tokens."""
        details: dict[str, object] = {"action": self.action, "reason": self.reason, "value": self.value}
        return details | {"steps": self.steps} | ({"limit": self.limit} if self.limit else {})


class Guard:
    """Decides about each step between its gradient and its update, and advances the run's loss ratio as it does.

    A guard sees a loss before anybody else, so where there is one it updates the ``LossRatio``, and nothing else does.
    """

    def __init__(self, config: GuardsConfig, loss_ratio: LossRatio) -> None:
        """Begin with no incident; ``loss_ratio`` is the run's."""
        self._config, self._loss_ratio = config, loss_ratio
        self._above = self._broken = self._skips = self._rollbacks = 0
        self.incident: Incident | None = None  # what is to be done about the last step, if anything
        self.ratio = 1.0  # loss ratio of the last step

    def admits(self, *, loss: float, grad_norm: float | None) -> bool:
        """Whether the update of a step may be made; called once a step, in order. ``incident`` says what else to do.

        Args:
            loss: Its loss in nats per token; the same on every rank.
            grad_norm: Norm of its gradient before clipping, likewise; None where it is not known.
        """
        self.ratio = self._loss_ratio.update(loss)
        self.incident = self._limit_skips(self._incident_of(loss, grad_norm))
        return self.incident is None or self.incident.action == "log"

    def _limit_skips(self, incident: Incident | None) -> Incident | None:
        if incident is None or incident.action != "skip":
            self._skips = 0
            return incident
        if self._skips == self._config.max_skips:
            limit = f"guards.max_skips: {self._skips:,} updates in a row were skipped"
            return replace(incident, action="stop", limit=limit)
        self._skips += 1
        return incident

    def _incident_of(self, loss: float, grad_norm: float | None) -> Incident | None:
        threshold, non_finite = self._config.loss_ratio, self._config.non_finite
        self._above = self._above + 1 if threshold is not None and self.ratio > threshold.above else 0
        broken_gradient = grad_norm is not None and not math.isfinite(grad_norm)
        self._broken = self._broken + 1 if broken_gradient or not math.isfinite(loss) else 0
        if self._broken and non_finite is not None:
            if not math.isfinite(loss):
                return self._limited(Incident(non_finite, "loss", loss, self._broken), first=1)
            return self._limited(Incident(non_finite, "gradient", grad_norm or 0.0, self._broken), first=1)
        if threshold is not None and self._above >= threshold.steps:
            incident = Incident(threshold.action, "loss_ratio", self.ratio, self._above)
            return self._limited(incident, first=threshold.steps)
        return None

    def _limited(self, incident: Incident, *, first: int) -> Incident | None:
        if incident.action == "log" and incident.steps > first:
            return None  # one line for an incident, however long it lasts
        if incident.action == "rollback" and self._rollbacks == self._config.max_rollbacks:
            limit = f"guards.max_rollbacks: the run was rolled back {self._rollbacks:,} times"
            return replace(incident, action="stop", limit=limit, saves=False)
        return incident

    def roll_back(self) -> None:
        """Count a rollback, after which nothing seen before it counts; the loss ratio is taken back by its owner."""
        self._rollbacks += 1
        self._above = self._broken = self._skips = 0
        self.incident = None

    def state_dict(self) -> dict[str, int]:
        """Everything a resumed run needs beside the loss ratio, as plain values."""
        return {"above": self._above, "broken": self._broken, "skips": self._skips, "rollbacks": self._rollbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; an empty state is that of a run without guards."""
        self._above, self._broken = int(state.get("above", 0)), int(state.get("broken", 0))
        self._skips, self._rollbacks = int(state.get("skips", 0)), int(state.get("rollbacks", 0))
        self.incident = None
