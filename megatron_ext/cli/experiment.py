"""``experiment``: a comparison of runs from one JSON file, trained, watched and reported."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import AsJson, ExperimentPath
from megatron_ext.cli.experiment_run import command as run_command
from megatron_ext.cli.experiment_tables import console, status_table
from megatron_ext.cli.report import TargetLoss
from megatron_ext.errors import UserError
from megatron_ext.experiments.config import Experiment, load_experiment

if TYPE_CHECKING:
    from megatron_ext.cli.experiment_runs import RunStatus

experiment_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
experiment_app.command("run")(run_command)


@experiment_app.callback()
def _root() -> None:
    """Comparisons: one base config, variants that change a part of it, seeds.

    Example: megatron-ext experiment run configs/experiments/comparators.json
    """


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
    from megatron_ext.cli.experiment_runs import done, statuses

    experiment = load_experiment(file)
    found = statuses(experiment)
    if watch:
        found = _watched(experiment, found, every=every)
    if as_json:
        typer.echo(json.dumps([item.to_json() for item in found], indent=2))
        return
    console().print(status_table(found))
    typer.echo(done(found))
    for item in found:
        if item.state == "failed":
            typer.echo(f"{item.name} failed: {item.note}", err=True)


def _watched(experiment: Experiment, found: "list[RunStatus]", *, every: float) -> "list[RunStatus]":
    """Show the table until no run waits in the queue or runs; the last statuses."""
    from rich.live import Live

    from megatron_ext.cli.experiment_runs import statuses

    with Live(status_table(found), console=console(), auto_refresh=False, transient=True) as live:
        while any(item.state in {"queued", "running"} for item in found):
            time.sleep(every)
            found = statuses(experiment)
            live.update(status_table(found), refresh=True)
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
    from megatron_ext.cli.experiment_runs import data_of, done, statuses

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
