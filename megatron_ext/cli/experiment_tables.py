"""What ``experiment`` prints: what would be trained, and how far the runs are."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ext.text import format_duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from megatron_ext.cli.experiment_runs import RunStatus

_STYLES = {
    "finished": "green",
    "failed": "red",
    "running": "cyan",
    "queued": "blue",
    "interrupted": "yellow",
    "waiting": "dim",
}


def console() -> "Console":
    """The standard output; a pipe or a file has no width, and nothing is cut off there."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=180)


def status_table(found: Sequence["RunStatus"]) -> "Table":
    """How far each run is."""
    from rich.table import Table

    jobs = any(item.queued for item in found)
    columns = ("variant", "seed", "state", *(("job",) if jobs else ()))
    table = _table(*columns, "step", "tokens", "val loss", "max ratio", "time", "left")
    assert isinstance(table, Table)
    for item in found:
        progress = item.progress
        table.add_row(
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
    return table


def plan_table(found: Sequence["RunStatus"]) -> "Table":
    """What would be trained."""

    table = _table("variant", "seed", "state", "steps", "tokens", "run directory")
    for item in found:
        plan = item.run.config.plan()
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
        right = name not in {"variant", "state", "job", "run directory"}
        table.add_column(name, justify="right" if right else "left", no_wrap=right)
    return table


def _job(item: "RunStatus") -> str:
    job = item.queued
    if job is None:
        return ""
    where = job.reason if job.state == "PENDING" else job.nodes
    return f"{job.job} {job.state}" + (f" ({where})" if where else "")


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)
