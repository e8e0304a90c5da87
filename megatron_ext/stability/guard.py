"""Guards: what to do about a loss that rises or is no number, decided between a step's gradient and its update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ext.config.guards import GuardAction, GuardsConfig
from megatron_ext.stability.loss_ratio import LossRatio

Reason = Literal["loss", "gradient", "loss_ratio"]


class GuardStop(Exception):  # noqa: N818 - nothing is wrong with the program
    """A guard ended the run; the message says why and what is left. Exit status 1, without a traceback."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done about a step. Deciding leaves the weights alone unless the action is "log"."""

    action: GuardAction
    reason: Reason
    """loss, gradient: it is not finite. loss_ratio: it was above the threshold."""

    value: float
    """The loss, the gradient norm or the loss ratio of the step."""

    steps: int
    """Consecutive steps that make up the incident so far, this one included."""

    limit: str | None = None
    """Why the run stops although the action asked for is another one."""

    saves: bool = True
    """Whether a stop saves a checkpoint. Not where rollbacks were of no use: the newest checkpoint is then still one
    from before the incident."""

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
    """The decisions, as a state machine over steps without knowledge of where the values come from."""

    def __init__(self, config: GuardsConfig) -> None:
        """Begin with no incident."""
        self._config = config
        self._above = 0
        self._broken = 0
        self._skips = 0
        self._rollbacks = 0

    @property
    def rollbacks(self) -> int:
        """Rollbacks of the run so far."""
        return self._rollbacks

    def observe(self, *, loss: float, ratio: float, grad_norm: float | None) -> Verdict | None:
        """Take a step and return what is to be done about it, if anything.

        Args:
            loss: Its loss.
            ratio: Its loss ratio; infinite where the loss is not finite.
            grad_norm: Norm of its gradient before clipping; None where it is not known.
        """
        verdict = self._judge(loss, ratio, grad_norm)
        if verdict is None or verdict.action != "skip":
            self._skips = 0
            return verdict
        if self._skips == self._config.max_skips:
            limit = f"guards.max_skips: {self._skips:,} updates in a row were skipped"
            return replace(verdict, action="stop", limit=limit)
        self._skips += 1
        return verdict

    def _judge(self, loss: float, ratio: float, grad_norm: float | None) -> Verdict | None:
        threshold, non_finite = self._config.loss_ratio, self._config.non_finite
        self._above = self._above + 1 if threshold is not None and ratio > threshold.above else 0
        broken_gradient = grad_norm is not None and not math.isfinite(grad_norm)
        self._broken = self._broken + 1 if broken_gradient or not math.isfinite(loss) else 0
        if self._broken and non_finite is not None:
            if not math.isfinite(loss):
                return self._limited(Verdict(non_finite, "loss", loss, self._broken), first=1)
            return self._limited(Verdict(non_finite, "gradient", grad_norm or 0.0, self._broken), first=1)
        if threshold is not None and self._above >= threshold.steps:
            verdict = Verdict(threshold.action, "loss_ratio", ratio, self._above)
            return self._limited(verdict, first=threshold.steps)
        return None

    def _limited(self, verdict: Verdict, *, first: int) -> Verdict | None:
        if verdict.action == "log" and verdict.steps > first:
            return None  # one line for an incident, however long it lasts
        if verdict.action == "rollback" and self._rollbacks == self._config.max_rollbacks:
            limit = f"guards.max_rollbacks: the run was rolled back {self._rollbacks:,} times"
            return replace(verdict, action="stop", limit=limit, saves=False)
        return verdict

    def roll_back(self) -> None:
        """Count a rollback; what was seen before it does not count any more."""
        self._rollbacks += 1
        self._above = self._broken = self._skips = 0

    def state_dict(self) -> dict[str, int]:
        """Everything a resumed run needs to go on, as plain values."""
        return {"above": self._above, "broken": self._broken, "skips": self._skips, "rollbacks": self._rollbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; an empty state is that of a run without guards."""
        self._above, self._broken = int(state.get("above", 0)), int(state.get("broken", 0))
        self._skips, self._rollbacks = int(state.get("skips", 0)), int(state.get("rollbacks", 0))


class UpdateGuard:
    """A guard as the engine's judge: sees every step once, before its update."""

    def __init__(self, config: GuardsConfig) -> None:
        """Begin a run; ``config`` has a guard that is on."""
        self._guard = Guard(config)
        self._ratio = LossRatio()
        self._verdict: Verdict | None = None

    @property
    def verdict(self) -> Verdict | None:
        """About the last step."""
        return self._verdict

    def admits(self, *, loss: float, grad_norm: float | None) -> bool:
        """Whether the update may be made; see ``engine.update_gate.Judge``."""
        self._verdict = self._guard.observe(loss=loss, ratio=self._ratio.update(loss), grad_norm=grad_norm)
        return self._verdict is None or self._verdict.action == "log"

    def roll_back(self, state: Mapping[str, Any], loss_ratio: Mapping[str, object]) -> None:
        """Go on from a checkpoint's loss ratios, remembering the rollbacks before and this one."""
        rollbacks = self._guard.rollbacks
        self.load_state_dict({**state, "rollbacks": rollbacks}, loss_ratio)
        self._guard.roll_back()

    def state_dict(self) -> dict[str, int]:
        """State of the guard; that of its loss ratio is the run's own."""
        return self._guard.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], loss_ratio: Mapping[str, object]) -> None:
        """Go on from a checkpoint: the guard's state, and the state of the run's loss ratio."""
        self._guard.load_state_dict(state)
        self._ratio.load_state_dict(loss_ratio)
        self._verdict = None
