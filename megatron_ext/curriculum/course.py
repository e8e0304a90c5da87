"""The course of a run: its plan as it stands, which under adaptive pacing is decided as the run goes."""

from collections.abc import Mapping
from typing import Any

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError


class Course:
    """The plan of a run under fixed pacing: known from the beginning and never another."""

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan

    @property
    def plan(self) -> TrainingPlan:
        """The run as it stands; steps that are done never change in it."""
        return self._plan

    def observe(self, *, seq_len: int, loss: float, variance: float | None) -> None:
        """Take the outcome of a step, every step once and in order; a fixed plan does not ask for it.

        Args:
            seq_len: Length of the step, in tokens.
            loss: Mean loss in nats per token, also when it is not finite.
            variance: Largest element of sqrt(Adam's second moment); None where it was not measured.
        """

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return self._plan.to_json()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside its config and its step, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            UserError: the state is that of another kind of pacing.
        """
        if state:
            raise UserError(
                f"the checkpoint holds a pacing state with {', '.join(sorted(state))}, and this version's pacing of "
                "the run has none: resume with the version that wrote it"
            )
