"""The plan of a run as a training loop follows it: fixed, or decided as the run goes (adaptive.py)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.errors import UserError

Action = Literal["grow", "hold", "back"]


@dataclass(frozen=True)
class Decision:
    """What happens to the length, and why. Made by one rank and followed by all."""

    step: int  # finished steps; the first step that it concerns has this number
    action: Action  # what the measurements ask for; the bounds may keep the length from following
    seq_len: int  # length from here on, in tokens
    previous: int  # length of the step before, in tokens
    loss_ratio: float | None  # largest in the interval, as adaptive.py computes it
    variance_ratio: float | None  # likewise; None where the variance was not measured
    reason: str  # in words, for people

    def details(self) -> dict[str, object]:
        """What the event in the metrics says, beside step and tokens."""
        return {name: value for name, value in asdict(self).items() if name != "step"}


class Schedule:
    """The plan of a run as it stands. This one is fixed: known from the beginning and never another.

    A loop asks ``plan`` for the step, tells ``observe`` its outcome, and where ``due`` says so lets ``decide`` and
    ``apply`` change the steps that are left.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan

    @property
    def plan(self) -> TrainingPlan:
        """The run as it stands; steps that are done never change in it."""
        return self._plan

    def observe(self, *, seq_len: int, loss: float, variance: float | None = None) -> None:
        """Take the outcome of a step, every step once and in order, before a decision after it.

        Args:
            seq_len: Length of the step, in tokens.
            loss: Mean loss in nats per token, also when it is not finite.
            variance: Largest element of sqrt(Adam's second moment); None where it was not measured.
        """

    def due(self, after: PlannedStep) -> bool:  # noqa: ARG002
        """Whether a decision is due after a step."""
        return False

    def decide(self, after: PlannedStep) -> Decision:
        """The decision after a step, from what was observed up to it; changes nothing. Asked where one is due."""
        raise AssertionError(f"no decision is due after step {after.step} of a fixed plan")

    def apply(self, decision: Decision) -> None:
        """Go on as decided. Steps before ``decision.step`` stay as they were."""
        raise AssertionError(f"a fixed plan has no decisions to apply, such as {decision}")

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return self._plan.to_json()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside pacing, run and step, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises UserError if the state is that of another kind of pacing, or of another version.
        """
        if state:
            raise UserError(
                f"the checkpoint holds a pacing state with {', '.join(sorted(state))}, and this version's pacing of "
                "the run has none: resume with the version that wrote it"
            )
