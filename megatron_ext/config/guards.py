"""The guards section: what a run does about a loss that rises or is no number. Off by default."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.base import PositiveInt, Section

GuardAction = Literal["log", "stop", "skip", "rollback"]
"""log: an event, nothing else. stop: leave out the step's update, save a checkpoint, end the run with exit status 1.
skip: leave out the step's update and go on. rollback: load the last checkpoint from before the incident and go on from
there with other samples."""


class LossRatioGuard(Section):
    """An incident is a loss ratio that stays high."""

    above: Annotated[float, Field(gt=1)]
    """Loss ratio (training loss over the lowest loss of any earlier step) beyond which a step counts."""

    steps: PositiveInt = 1
    """Consecutive steps that make an incident; with small batches, whose loss is noisy, more than one."""

    action: GuardAction
    """What is done about it, from the last of these steps on."""


class GuardsConfig(Section):
    """Checks between a step's gradient and its update. A guard that is on makes the host wait for every step."""

    loss_ratio: LossRatioGuard | None = None
    """Guard against a loss ratio that stays high; None: off."""

    non_finite: GuardAction | None = None
    """What is done at once where the loss or the gradient is NaN or infinite (an overflow of fp16, which its loss scale
    deals with, is none); None: off."""

    max_skips: PositiveInt = 10
    """After this many skipped updates in a row the run stops instead."""

    max_rollbacks: PositiveInt = 3
    """After this many rollbacks in the whole run it stops instead."""

    @property
    def are_on(self) -> bool:
        """Whether any guard is on."""
        return self.loss_ratio is not None or self.non_finite is not None

    @property
    def roll_back(self) -> bool:
        """Whether any guard rolls back."""
        return self.non_finite == "rollback" or (self.loss_ratio is not None and self.loss_ratio.action == "rollback")
