"""``status``: how far one run is, on this machine or as a SLURM job."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ext.cli.common import AsJson
from megatron_ext.errors import UserError
from megatron_ext.text import finite_or_none, format_duration

if TYPE_CHECKING:
    from megatron_ext.cli.progress import Progress, Situation
    from megatron_ext.config.run import RunConfig

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or its config.", show_default=False)]


def command(run: RunPath, *, as_json: AsJson = False) -> None:
    """Say where a run is: its job in the queue, steps, tokens, speed, time to the end, loss, newest checkpoint.

    Example: megatron-ext status runs/slw
    """
    from megatron_ext.cli.progress import read_progress, situations

    config = run_config(run)
    progress = read_progress(config, config.plan())
    [situation] = situations([(config.run_dir, progress)])
    told = _told(config, progress, situation)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for name, value in _lines(told).items():
        typer.echo(f"{name:<12} {value}")


def run_config(path: Path) -> "RunConfig":
    """The config of a run's directory (also of one that waits for its first job), or of a config file.

    The run directory is the one that was named, wherever the config says that it is.

    Raises:
        UserError: there is none.
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.slurm.record import config_file

    if path.is_file():
        return load_config(path)
    for file in (path / "config.json", config_file(path)):
        if file.is_file():
            resolved = path.resolve()
            return load_config(file).model_copy(update={"output_dir": str(resolved.parent), "name": resolved.name})
    raise UserError(f"{path} is no run: it holds neither config.json nor slurm/config.json; name a run's directory")


def _told(config: "RunConfig", progress: "Progress", situation: "Situation") -> dict[str, Any]:
    job, queued, checkpoint = situation.record, situation.queued, progress.checkpoint
    return {
        "run": config.name,
        "run_dir": str(config.run_dir),
        "state": situation.state,
        "note": situation.note,
        "job": job.job if job else None,
        "job_state": queued.state if queued else None,
        "job_reason": queued.reason if queued else None,
        "job_start": queued.start if queued else None,
        "job_time_left": queued.time_left if queued else None,
        "nodes": (queued.nodes if queued else "") or (job.nodes if job else "") or None,
        "restarts": job.restart if job else 0,
        "step": progress.step,
        "steps": progress.steps,
        "tokens": progress.tokens,
        "total_tokens": progress.total_tokens,
        "tokens_per_s": progress.tokens_per_s,
        "eta_s": progress.eta_seconds,
        "loss": finite_or_none(progress.loss),
        "valid_loss": finite_or_none(progress.valid_loss),
        "checkpoint": checkpoint.name if checkpoint else None,
        "checkpoint_age_s": time.time() - checkpoint.stat().st_mtime if checkpoint else None,
    }


def _lines(told: dict[str, Any]) -> dict[str, str]:
    """What is known, in words."""
    share = f" ({told['tokens'] / told['total_tokens']:.1%} of the tokens)"
    lines = {"run": told["run_dir"], "state": told["state"] + (f": {told['note']}" if told["note"] else "")}
    if told["job"]:
        lines["job"] = _job(told)
    lines["step"] = f"{told['step']:,} of {told['steps']:,}{share}"
    lines["tokens"] = f"{told['tokens']:,} of {told['total_tokens']:,}"
    if told["tokens_per_s"] is not None:
        lines["speed"] = f"{told['tokens_per_s']:,.0f} tokens/s"
    if told["eta_s"] is not None and told["state"] != "finished":
        lines["to the end"] = f"{format_duration(told['eta_s'])} at this speed"
    if told["loss"] is not None:
        lines["loss"] = f"{told['loss']:.4f}"
    if told["valid_loss"] is not None:
        lines["validation"] = f"{told['valid_loss']:.4f}"
    if told["checkpoint"]:
        lines["checkpoint"] = f"{told['checkpoint']}, {format_duration(told['checkpoint_age_s'])} ago"
    return lines


def _job(told: dict[str, Any]) -> str:
    parts = [told["job"]]
    if told["job_state"]:
        parts.append(told["job_state"])
    if told["job_state"] == "PENDING":
        parts.append(f"because of {told['job_reason']}, expected start {told['job_start']}")
    elif told["job_time_left"]:
        parts.append(f"{told['job_time_left']} left")
    if told["nodes"]:
        parts.append(f"on {told['nodes']}")
    if told["restarts"]:
        parts.append(f"restarted {told['restarts']} time(s)")
    return ", ".join(parts)
