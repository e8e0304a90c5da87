"""What a run does about a step that went wrong: leave out its update, go back, stop. Loaded where one did."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_ext.build import Run, restore_host_state
from megatron_ext.curriculum.guards import GuardStop, Incident
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.curriculum.sampler import positions_between
from megatron_ext.metrics.step_log import FetchedStep
from megatron_ext.runtime.log import LOGGER


def act_on(
    run: Run, after: PlannedStep, incident: Incident, *, save: Callable[[Run, PlannedStep], Path | None]
) -> int | None:
    """Do what a guard asks for after a step; the step to go on with, where that is not the next one.

    Raises:
        GuardStop: the run has to end.
    """
    run.recorder.event("guard", step=after.step + 1, tokens=after.end_tokens, **incident.details())
    if incident.action == "rollback":
        return roll_back(run, after, incident)
    if incident.action == "stop":
        raise stop_for(run, after, incident, saved=save(run, after) if incident.saves else None)
    return None


def left_out(run: Run, step: FetchedStep) -> None:
    """Count and tell a step without an update because its gradient is not finite, where no guard acts on that.

    All ranks come to the same: loss and norm were reduced over them.

    Raises:
        GuardStop: there were ``guards.max_non_finite`` of them in a row.
    """
    guards = run.config.guards
    # An overflow of fp16 is its loss scale's business, unless the loss itself is no number.
    value = step.loss if run.config.training.precision == "fp16" else step.grad_norm
    if guards.non_finite not in (None, "log") or value is None or math.isfinite(value):
        run.pending.left_out = 0
        return
    run.pending.left_out += 1
    count, limit, after = run.pending.left_out, guards.max_non_finite, step.info.planned
    incident = Incident("skip", "gradient" if math.isfinite(step.loss) else "loss", value, count)
    if count == limit:
        incident = replace(incident, action="stop", limit=f"guards.max_non_finite: {limit:,} updates in a row left out")
    if count in (1, limit):
        run.recorder.event("guard", step=after.step + 1, tokens=after.end_tokens, **incident.details())
    if count == limit:
        raise stop_for(run, after, incident)
    if count == 1 and run.processes.info.is_main:
        LOGGER.warning(
            "step %d: %s, so its update is left out; after %d of them in a row (guards.max_non_finite) the run stops",
            after.step + 1,
            incident.why,
            limit,
        )


def no_checkpoint(run: Run, after: PlannedStep) -> None:
    """Tell that weights are not finite and that there is no checkpoint of them.

    Raises:
        GuardStop: the run is at its end, and would leave without its last checkpoint as if nothing had happened.
    """
    step = after.step + 1
    run.recorder.event("guard", step=step, tokens=after.end_tokens, action="no checkpoint", reason="weights")
    newest = _newest(run)  # all ranks ask
    if step == run.last_step:
        raise GuardStop(f"weights are not finite at the last step, {step:,}, so they are not saved: {newest}")
    if run.processes.info.is_main:
        LOGGER.warning("no checkpoint after step %d: weights are not finite; %s", step, newest)


def compare_copies(run: Run, after: PlannedStep) -> None:
    """Compare the weights of all ranks that hold copies of them, bit for bit, by one checksum of each parameter.

    Raises:
        GuardStop: they differ. All ranks see the same checksums.
    """
    holders: dict[tuple[str, str], dict[int, list[int]]] = {}
    for rank, sums in enumerate(run.processes.gather(run.engine.checksums())):
        assert isinstance(sums, dict)
        for part, checksum in sums.items():
            holders.setdefault(part, {}).setdefault(checksum, []).append(rank)
    different = [(part[0], ranks.values()) for part, ranks in holders.items() if len(ranks) > 1]
    if different:
        name, groups = different[0]
        ranks = " against ".join(f"rank {', '.join(map(str, group))}" for group in groups)
        others = f" and {len(different) - 1:,} more parameters" if len(different) > 1 else ""
        raise GuardStop(
            f"the copies of {name}{others} are not equal after step {after.step + 1:,}: {ranks}. Memory or a device of "
            f"one of these ranks may be faulty (guards.check_copies_every). {_newest(run)}"
        )


def _newest(run: Run) -> str:
    newest = run.checkpointer.newest()
    return f"{newest} is the newest checkpoint" if newest else "there is no checkpoint"


def roll_back(run: Run, after: PlannedStep, incident: Incident) -> int:
    """Go back to before an incident, skip the samples read since, and return the step to go on with."""
    assert run.guard is not None
    checkpoint = run.checkpointer.newest_whole(not_after=after.step + 1 - incident.steps)
    if checkpoint is None:
        raise stop_for(run, after, replace(incident, limit="there is no checkpoint from before it to roll back to"))
    manifest = run.checkpointer.load(checkpoint)
    skipped = run.loader.skipped.without(positions_between(run.plan, manifest.step, after.step))
    if skipped.left < after.batch_size:
        raise stop_for(run, after, replace(incident, limit="rolling back would leave no sample to read"))
    more = run.loader.skipped.left - skipped.left
    restore_host_state(manifest, schedule=run.schedule, loader=run.loader, loss_ratio=run.loss_ratio)
    run.loader.skip(skipped)
    run.guard.roll_back()
    run.pending.left_out = 0
    state = replace(manifest, guard=run.guard.state_dict(), skipped_samples=skipped.to_json())
    run.checkpointer.go_on_from(checkpoint, state)
    # From here on a run that is killed goes on as this one does. The records go after the checkpoints: a later
    # checkpoint without the records of its steps would leave a hole in the metrics.
    run.recorder.roll_back(step=manifest.step, tokens=manifest.tokens)
    place = {"from_step": after.step + 1, "to_step": manifest.step, "tokens": manifest.tokens}
    run.recorder.event("rollback", **place, skipped_samples=more, checkpoint=str(checkpoint))
    return manifest.step


def stop_for(run: Run, after: PlannedStep, incident: Incident, *, saved: Path | None = None) -> GuardStop:
    """The end of a run that a guard stops: what happened, what is left, what to do."""
    left = _newest(run)
    if saved:
        left = f"{saved} holds the weights without that step's update; start again to go on with the next step"
    why = f"{incident.why}; {incident.limit}" if incident.limit else incident.why
    return GuardStop(f"a guard stopped the run at step {after.step + 1:,}: {why}. {left}, or change guards first")
