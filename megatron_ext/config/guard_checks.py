"""Checks between the guards and the checkpoints that they need."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ext.config.run import RunConfig


def guard_problems(config: "RunConfig") -> Iterator[str]:
    """One line per reason for which a rollback would find no checkpoint from before the incident."""
    guards, checkpoint = config.guards, config.checkpoint
    if not guards.roll_back:
        return
    if checkpoint.every is None:
        key = "guards.non_finite" if guards.non_finite == "rollback" else "guards.loss_ratio.action"
        yield (
            f'{key} is "rollback" and checkpoint.every null, so that there is nothing to go back to before the end: '
            'write checkpoint.every, for example {"steps": 100}'
        )
        return
    ratio = guards.loss_ratio
    if ratio is None or ratio.action != "rollback":
        return
    # An incident is seen when ``steps`` steps are bad, and checkpoints may be due after all of them but the last.
    within = -(-(ratio.steps - 1) // (checkpoint.every.steps or ratio.steps))
    if checkpoint.keep_last <= within:
        yield (
            f"checkpoint.keep_last is {checkpoint.keep_last} with guards.loss_ratio.steps {ratio.steps} and "
            f"checkpoint.every {checkpoint.every}: checkpoints from within an incident may be all that is left when it "
            f"is seen; write checkpoint.keep_last {within + 1} or more"
        )
