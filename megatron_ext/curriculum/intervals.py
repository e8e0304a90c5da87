"""When something is due that happens every n steps or tokens."""

from megatron_ext.base import Duration
from megatron_ext.curriculum.plan import PlannedStep


def is_due(every: Duration | None, step: PlannedStep) -> bool:
    """Whether the end of ``step`` passes a multiple of ``every``; never with None.

    By tokens it is due after the step that reaches or passes the multiple, once for each step that does.
    """
    if every is None:
        return False
    if every.steps is not None:
        return (step.step + 1) % every.steps == 0
    assert every.tokens is not None
    return (step.consumed_tokens + step.tokens) // every.tokens > step.consumed_tokens // every.tokens
