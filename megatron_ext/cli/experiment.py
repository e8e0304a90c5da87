"""``experiment``: a comparison of runs from one JSON file, trained, watched and reported."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import AsJson, ExperimentPath, grouped, table
from megatron_ext.cli.report import TargetLoss
from megatron_ext.cli.slurm_options import SlurmOptions, check_runs
from megatron_ext.errors import UserError
from megatron_ext.experiments.config import Experiment, load_experiment
from megatron_ext.experiments.runs import ATTEMPTS, Ledger, RunStatus, data_of, done, plans_of, statuses, train_all
from megatron_ext.launch.slurm import FOLDER, absolute, submit, submit_job
from megatron_ext.runtime.places import check_place
from megatron_ext.text import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megatron_ext.launch.job_script import TrainingJob

experiment_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_STYLES = {
    "finished": "green",
    "failed": "red",
    "running": "cyan",
    "queued": "blue",
    "interrupted": "yellow",
    "waiting": "dim",
}
_LEFT = frozenset({"variant", "state", "job", "run directory"})


@experiment_app.callback()
def _root() -> None:
    """Comparisons: one base config, variants that change a part of it, seeds.

    Example: megatron-ext experiment run configs/experiments/comparators.json
    """


@experiment_app.command("run")
@grouped
def run(
    file: ExperimentPath,
    *,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; by default the file's, or one per GPU, or one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit the runs as one array; the options below are for its jobs.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Most runs of the array at a time.")] = None,
    options: SlurmOptions,
) -> None:
    """Train the runs of an experiment: one after the other here, or with --slurm as an array of jobs.

    Finished runs are skipped, interrupted ones go on. One that fails is tried once more from its newest checkpoint and
    then marked, and the others are still trained; then the exit status is 1. SIGINT (Ctrl-C) and SIGTERM save the
    present run and begin no other. With --slurm the command returns at once, runs that have a job are left to it, and a
    last job writes the report.

    Example: megatron-ext experiment run configs/experiments/comparators.json --dry-run
    """
    experiment = load_experiment(file)
    for item in experiment.runs:
        check_place(item.config.run_dir)
    if not slurm:
        _run_here(experiment, nproc=nproc, dry_run=dry_run)
        return
    job = options.job([item.config for item in experiment.runs])
    _submit(experiment, replace(job, at_once=limit, attempts=ATTEMPTS), dry_run=dry_run)


def _run_here(experiment: Experiment, *, nproc: int | None, dry_run: bool) -> None:
    if dry_run:
        _announce(experiment)
        return
    finished = train_all(experiment, nproc=nproc, say=typer.echo)
    found = statuses(experiment)
    _console().print(_status_table(found))
    typer.echo(done(found))
    if finished:
        from megatron_ext.analysis.report import write_report

        page = Path(experiment.config.output_dir) / "report.html"
        write_report(data_of(experiment), page, title=experiment.config.name, target_loss=None)
        typer.echo(f"report: {page}")
    failed = any(status.state == "failed" for status in found)
    if failed or not finished:
        raise typer.Exit(1 if failed else 0)


def _announce(experiment: Experiment) -> None:
    plans = plans_of(experiment)
    _console().print(_plan_table(statuses(experiment)))
    totals = sum(plan.tokens for plan in plans)
    typer.echo(f"{len(plans)} runs, {sum(plan.steps for plan in plans):,} steps, {totals:,} tokens")


def _submit(experiment: Experiment, job: "TrainingJob", *, dry_run: bool) -> None:
    """Submit what is not finished and has no job yet, and a job that reports when all of it is over."""
    left = [item for item in statuses(experiment) if item.state not in {"finished", "queued", "running"}]
    if not left:
        typer.echo("every run is finished or has a job in the queue")
        return
    configs = [item.run.config for item in left]
    output = absolute(Path(experiment.config.output_dir)) / FOLDER
    job = replace(
        job,
        name=experiment.config.name,
        run_dirs=tuple(absolute(config.run_dir) for config in configs),
        task_ids=tuple(range(len(left))),
        output=output,
    )
    check_runs(configs, job.resources, dry_run=dry_run)
    if dry_run:
        _announce(experiment)
        typer.echo(job.script(), nl=False)
        return
    ledger = Ledger(experiment)
    number = submit_job(job, configs)
    for item in left:
        ledger.forget(item.run)
    typer.echo(f"submitted array {number}: {len(left)} runs")
    for task, item in enumerate(left):
        typer.echo(f"  {number}_{task}  {item.name}")
    reporter = _submit_report(experiment, job, after=number)
    typer.echo(f"job {reporter} then writes the report; `megatron-ext experiment status {experiment.source} --watch`")


def _submit_report(experiment: Experiment, job: "TrainingJob", *, after: str) -> str:
    arguments = ("experiment", "report", str(absolute(experiment.source)))
    script = job.command_script(arguments, name=f"{experiment.config.name}-report", dependency=f"afterany:{after}")
    return submit(script, remedy="The array is submitted; call `megatron-ext experiment report` yourself")


@experiment_app.command("status")
def status(
    file: ExperimentPath,
    *,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again until nothing waits or runs any more.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks of --watch.")] = 15.0,
    as_json: AsJson = False,
) -> None:
    """Say how far each run of an experiment is, and where it stands in SLURM's queue.

    Example: megatron-ext experiment status configs/experiments/comparators.json --watch
    """
    experiment = load_experiment(file)
    found = statuses(experiment)
    if watch:
        found = _watched(experiment, found, every=every)
    if as_json:
        typer.echo(json.dumps([item.to_json() for item in found], indent=2))
        return
    _console().print(_status_table(found))
    typer.echo(done(found))
    for item in found:
        if item.state == "failed":
            typer.echo(f"{item.name} failed: {item.note}", err=True)


def _watched(experiment: Experiment, found: list[RunStatus], *, every: float) -> list[RunStatus]:
    """Show the table until no run waits in the queue or runs; the last statuses."""
    from rich.live import Live

    with Live(_status_table(found), console=_console(), auto_refresh=False, transient=True) as live:
        while any(item.state in {"queued", "running"} for item in found):
            time.sleep(every)
            found = statuses(experiment)
            live.update(_status_table(found), refresh=True)
    return found


@experiment_app.command("report")
def report(
    file: ExperimentPath,
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The .html to write; by default report.html in the experiment's output_dir.",
            show_default=False,
        ),
    ] = None,
    target_loss: TargetLoss = None,
) -> None:
    """Compare the runs of an experiment that have begun: one HTML file, and a table in Markdown on the standard output.

    Seeds of a variant have one color in the page and one row in the table, with mean and spread. The first variant is
    what the others are compared with.

    Example: megatron-ext experiment report configs/experiments/comparators.json > table.md
    """
    from megatron_ext.analysis.report import write_report

    experiment = load_experiment(file)
    target = output if output is not None else Path(experiment.config.output_dir) / "report.html"
    if target.suffix.lower() != ".html":
        raise UserError(f"--output {target}: the report is a page; give a name that ends in .html")
    runs = data_of(experiment)
    comparison = write_report(runs, target, title=experiment.config.name, target_loss=target_loss)
    typer.echo(comparison.markdown())
    typer.echo(target, err=True)
    found = statuses(experiment)
    if any(status.state != "finished" for status in found):
        typer.echo(f"not everything is there yet: {done(found)}", err=True)


def _console() -> "Console":
    """The standard output; a pipe or a file has no width, and nothing is cut off there."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=180)


def _status_table(found: Sequence[RunStatus]) -> "Table":
    jobs = any(item.queued for item in found)
    columns = ("variant", "seed", "state", *(("job",) if jobs else ()))
    shown = table(*columns, "step", "tokens", "val loss", "max ratio", "time", "left", left=_LEFT)
    for item in found:
        progress = item.progress
        shown.add_row(
            item.run.variant,
            str(item.run.seed),
            f"[{_STYLES[item.state]}]{item.state}[/]",
            *((_job(item),) if jobs else ()),
            f"{progress.step:,}/{progress.steps:,}",
            f"{progress.tokens:,}" if progress.tokens else "",
            _number(progress.valid_loss, 4),
            _number(progress.largest_ratio, 3),
            format_duration(progress.seconds) if progress.seconds else "",
            format_duration(progress.eta_seconds) if progress.eta_seconds else "",
        )
    return shown


def _plan_table(found: Sequence[RunStatus]) -> "Table":
    shown = table("variant", "seed", "state", "steps", "tokens", "run directory", left=_LEFT)
    for item in found:
        plan = item.run.config.plan()
        shown.add_row(
            item.run.variant,
            str(item.run.seed),
            f"[{_STYLES[item.state]}]{item.state}[/]",
            f"{plan.steps:,}",
            f"{plan.tokens:,}",
            str(item.run.config.run_dir),
        )
    return shown


def _job(item: RunStatus) -> str:
    job = item.queued
    if job is None:
        return ""
    where = job.reason if job.state == "PENDING" else job.nodes
    return f"{job.job} {job.state}" + (f" ({where})" if where else "")


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)
