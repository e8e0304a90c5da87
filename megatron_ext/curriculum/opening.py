"""From a pacing to its schedule."""

from megatron_ext.curriculum.pacing import Pacing, RunSpec
from megatron_ext.curriculum.pacings import AdaptivePacing
from megatron_ext.curriculum.plan import Schedule, TrainingPlan


def open_schedule(pacing: Pacing, run: RunSpec) -> Schedule:
    """The schedule of a run from its beginning. Raises UserError as TrainingPlan.build does."""
    if not isinstance(pacing, AdaptivePacing):
        return Schedule(TrainingPlan.build(pacing, run))
    # A run whose plan is fixed needs none of it.
    from megatron_ext.curriculum.adaptive import AdaptiveSchedule

    return AdaptiveSchedule(pacing, run)
