"""``report``: a page, or a picture, that shows or compares runs."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.errors import UserError

TargetLoss = Annotated[
    float | None,
    typer.Option(
        "--target-loss",
        metavar="LOSS",
        help="Validation loss to which tokens and time are counted; by default the first run's final one.",
        show_default=False,
    ),
]


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, or metrics.jsonl files.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The .html or .png to write; by default report.html in the run's directory (several runs: here).",
            show_default=False,
        ),
    ] = None,
    target_loss: TargetLoss = None,
) -> None:
    """Show or compare runs: curves of everything that was measured, and a table, in one HTML file without network.

    The first run is what the others are compared with. A name that ends in .png gives a picture of the main curves
    instead. A run that is still going on can be shown too.

    Example: megatron-ext report runs/baseline runs/slw --output compare.html
    """
    from megatron_ext.analysis.report import run_labels, write_picture, write_report
    from megatron_ext.analysis.run_data import read_run

    target = output if output is not None else _default_output(runs)
    suffix = target.suffix.lower()
    if suffix not in {".html", ".png"}:
        raise UserError(f"--output {target}: the report is a page or a picture; give a name that ends in .html or .png")
    if suffix == ".png" and target_loss is not None:
        raise UserError(f"--target-loss {target_loss:g}: the picture has no table; leave it out, or write .html")
    found = [read_run(run, label=label) for run, label in zip(runs, run_labels(runs), strict=True)]
    if suffix == ".png":
        write_picture(found, target)
    else:
        title = found[0].label if len(found) == 1 else f"{len(found)} runs compared"
        write_report(found, target, title=title, target_loss=target_loss)
    typer.echo(target)


def _default_output(runs: list[Path]) -> Path:
    if len(runs) > 1:
        return Path("report.html")
    return (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.html"
