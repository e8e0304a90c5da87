"""``report``: a page, or a picture, that shows or compares runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.metrics.report_data import RunData
    from megatron_ext.metrics.report_table import Comparison

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
    target = output if output is not None else _default_output(runs)
    suffix = target.suffix.lower()
    if suffix not in {".html", ".png"}:
        raise UserError(f"--output {target}: the report is a page or a picture; give a name that ends in .html or .png")
    if suffix == ".png":
        if target_loss is not None:
            raise UserError(f"--target-loss {target_loss:g}: the picture has no table; leave it out, or write .html")
        _draw(runs, target)
    else:
        from megatron_ext.metrics.report_data import read_run

        found = [read_run(run, label=label) for run, label in zip(runs, labels(runs), strict=True)]
        title = found[0].label if len(found) == 1 else f"{len(found)} runs compared"
        write_page(found, target, title=title, target_loss=target_loss)
    typer.echo(target)


def write_page(
    runs: Sequence["RunData"], output: Path, *, title: str, target_loss: float | None = None
) -> "Comparison":
    """Write the HTML report of ``runs`` and return its table.

    Raises:
        UserError: the target is no loss, or the file cannot be written.
    """
    from megatron_ext.curriculum.loss_ratio import THRESHOLDS
    from megatron_ext.metrics.report_html import report_page
    from megatron_ext.metrics.report_table import compare

    if target_loss is not None and not (math.isfinite(target_loss) and target_loss > 0):
        raise UserError(f"--target-loss is {target_loss:g}: give a validation loss above 0, in nats per token")
    comparison = compare(runs, thresholds=THRESHOLDS, target=target_loss)
    page = report_page(runs, comparison, title=title, thresholds=THRESHOLDS)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise _unwritable(output, error) from None
    return comparison


def _draw(runs: list[Path], output: Path) -> None:
    # matplotlib takes half a second to import, which --help of every command would pay.
    from megatron_ext.metrics.curves import curves_of
    from megatron_ext.metrics.figure import draw_runs
    from megatron_ext.metrics.jsonl import read_metrics

    curves = []
    for run, label in zip(runs, labels(runs), strict=True):
        metrics = read_metrics(run)
        if not metrics.train:
            raise UserError(f"{run}: metrics.jsonl has no train record yet; wait for the run's first steps")
        curves.append(curves_of(metrics, label))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_runs(curves, output)
    except OSError as error:
        raise _unwritable(output, error) from None


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"--output {output}: cannot be written ({error.strerror}); choose another place")


def labels(runs: list[Path]) -> list[str]:
    """A name for each run: the shortest end of its path that tells all of them apart."""
    folders = [run.resolve() if run.is_dir() else run.resolve().parent for run in runs]
    if len(set(folders)) < len(folders):
        # The same folder twice, or two files of one folder: only the whole paths can differ.
        return [str(run) for run in runs]
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def _default_output(runs: list[Path]) -> Path:
    if len(runs) > 1:
        return Path("report.html")
    return (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.html"
