"""``experiment``: a comparison of runs from one JSON file, trained, watched and reported."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.cli.common import AsJson
from megatron_ext.cli.report import TargetLoss, write_page
from megatron_ext.config.experiment import load_experiment
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ext.cli.experiment_runs import RunStatus

experiment_app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

ExperimentPath = Annotated[Path, typer.Argument(metavar="FILE", help="JSON file of an experiment.", show_default=False)]
_STYLES = {"finished": "green", "failed": "red", "running": "cyan", "interrupted": "yellow", "waiting": "dim"}


@experiment_app.callback()
def _root() -> None:
    """Comparisons: one base config, variants that change a part of it, seeds.

    Example: megatron-ext experiment run configs/experiments/comparators.json
    """


@experiment_app.command("run")
def run(
    file: ExperimentPath,
    *,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Ranks on this machine; by default the file's, or one per GPU, or one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained.")] = False,
) -> None:
    """Train the runs of an experiment one after the other.

    Finished runs are skipped, interrupted ones go on, and where one fails the others are still trained; then the exit
    status is 1. SIGINT (Ctrl-C) and SIGTERM save the present run and begin no other.

    Example: megatron-ext experiment run configs/experiments/comparators.json --dry-run
    """
    from megatron_ext.cli.experiment_runs import done, plans_of, statuses, train_all

    experiment = load_experiment(file)
    if dry_run:
        plans = plans_of(experiment)
        _print(_plan_table(statuses(experiment)))
        totals = sum(plan.tokens for plan in plans)
        typer.echo(f"{len(plans)} runs, {sum(plan.steps for plan in plans):,} steps, {totals:,} tokens")
        return
    finished = train_all(experiment, nproc=nproc)
    found = statuses(experiment)
    _print(_status_table(found))
    typer.echo(done(found))
    failed = any(status.state == "failed" for status in found)
    if failed or not finished:
        raise typer.Exit(1 if failed else 0)


@experiment_app.command("status")
def status(file: ExperimentPath, *, as_json: AsJson = False) -> None:
    """Say how far each run of an experiment is.

    Example: megatron-ext experiment status configs/experiments/comparators.json
    """
    from megatron_ext.cli.experiment_runs import done, statuses

    found = statuses(load_experiment(file))
    if as_json:
        typer.echo(json.dumps([item.to_json() for item in found], indent=2))
        return
    _print(_status_table(found))
    typer.echo(done(found))


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
    from megatron_ext.cli.experiment_runs import data_of, done, statuses

    experiment = load_experiment(file)
    target = output if output is not None else Path(experiment.config.output_dir) / "report.html"
    if target.suffix.lower() != ".html":
        raise UserError(f"--output {target}: the report is a page; give a name that ends in .html")
    runs = data_of(experiment)
    comparison = write_page(runs, target, title=experiment.config.name, target_loss=target_loss)
    typer.echo(comparison.markdown())
    typer.echo(target, err=True)
    found = statuses(experiment)
    if any(status.state != "finished" for status in found):
        typer.echo(f"not everything is there yet: {done(found)}", err=True)


def _print(table: "Table") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe or a file has no width; nothing is cut off there.
        console = Console(highlight=False, width=160)
    console.print(table)


def _status_table(found: Sequence["RunStatus"]) -> "Table":
    from rich.table import Table

    table = _table("variant", "seed", "state", "step", "tokens", "val loss", "max ratio", "time")
    assert isinstance(table, Table)
    for item in found:
        table.add_row(
            item.run.variant,
            str(item.run.seed),
            f"[{_STYLES[item.state]}]{item.state}[/]",
            f"{item.step:,}/{item.steps:,}",
            f"{item.tokens:,}" if item.tokens else "",
            _number(item.valid_loss, 4),
            _number(item.largest_ratio, 3),
            duration(item.seconds) if item.seconds else "",
        )
    return table


def _plan_table(found: Sequence["RunStatus"]) -> "Table":
    from megatron_ext.curriculum.plan import TrainingPlan

    table = _table("variant", "seed", "state", "steps", "tokens", "run directory")
    for item in found:
        plan = TrainingPlan.from_config(item.run.config)
        table.add_row(
            item.run.variant,
            str(item.run.seed),
            f"[{_STYLES[item.state]}]{item.state}[/]",
            f"{plan.steps:,}",
            f"{plan.tokens:,}",
            str(item.run.config.run_dir),
        )
    return table


def _table(*columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in columns:
        right = name not in {"variant", "state", "run directory"}
        table.add_column(name, justify="right" if right else "left", no_wrap=right)
    return table


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def duration(seconds: float) -> str:
    """Seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
