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
    from megatron_ext.config.run import RunConfig
    from megatron_ext.launch.status import Progress, Situation

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or its config.", show_default=False)]


def command(run: RunPath, *, as_json: AsJson = False) -> None:
    """Say where a run is: its job in the queue, steps, tokens, speed, time to the end, loss, newest checkpoint.

    Example: megatron-ext status runs/slw
    """
    from megatron_ext.launch.status import read_progress, situations

    config = run_config(run)
    progress = read_progress(config, config.plan())
    [situation] = situations([(config.run_dir, progress)])
    values = _values(config, progress, situation)
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    for name, value in _lines(values).items():
        typer.echo(f"{name:<12} {value}")


def run_config(path: Path) -> "RunConfig":
    """The config of a run's directory (also of one that waits for its first job), or of a config file.

    The run directory is the one that was named, wherever the config says that it is.

    Raises:
        UserError: there is none.
    """
    from megatron_ext.config.loading import load_config
    from megatron_ext.launch.slurm import config_file

    if path.is_file():
        return load_config(path)
    for file in (path / "config.json", config_file(path)):
        if file.is_file():
            resolved = path.resolve()
            return load_config(file).model_copy(update={"output_dir": str(resolved.parent), "name": resolved.name})
    raise UserError(f"{path} is no run: it holds neither config.json nor slurm/config.json; name a run's directory")


def _values(config: "RunConfig", progress: "Progress", situation: "Situation") -> dict[str, Any]:
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


def _lines(values: dict[str, Any]) -> dict[str, str]:
    """What is known, in words."""
    share = f" ({values['tokens'] / values['total_tokens']:.1%} of the tokens)"
    lines = {"run": values["run_dir"], "state": values["state"] + (f": {values['note']}" if values["note"] else "")}
    if values["job"]:
        lines["job"] = _job(values)
    lines["step"] = f"{values['step']:,} of {values['steps']:,}{share}"
    lines["tokens"] = f"{values['tokens']:,} of {values['total_tokens']:,}"
    if values["tokens_per_s"] is not None:
        lines["speed"] = f"{values['tokens_per_s']:,.0f} tokens/s"
    if values["eta_s"] is not None and values["state"] != "finished":
        lines["to the end"] = f"{format_duration(values['eta_s'])} at this speed"
    if values["loss"] is not None:
        lines["loss"] = f"{values['loss']:.4f}"
    if values["valid_loss"] is not None:
        lines["validation"] = f"{values['valid_loss']:.4f}"
    if values["checkpoint"]:
        lines["checkpoint"] = f"{values['checkpoint']}, {format_duration(values['checkpoint_age_s'])} ago"
    return lines


def _job(values: dict[str, Any]) -> str:
    parts = [values["job"]]
    if values["job_state"]:
        parts.append(values["job_state"])
    if values["job_state"] == "PENDING":
        parts.append(f"because of {values['job_reason']}, expected start {values['job_start']}")
    elif values["job_time_left"]:
        parts.append(f"{values['job_time_left']} left")
    if values["nodes"]:
        parts.append(f"on {values['nodes']}")
    if values["restarts"]:
        parts.append(f"restarted {values['restarts']} time(s)")
    return ", ".join(parts)
