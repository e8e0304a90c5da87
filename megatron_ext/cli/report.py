"""``report``: one picture that shows or compares runs."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.errors import UserError


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, or metrics.jsonl files.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The PNG to write; by default report.png in the run's directory (several runs: here).",
        ),
    ] = None,
) -> None:
    """Draw loss against tokens and time, sequence length and learning rate of one or more runs.

    A run that is still going on can be drawn too.

    Example: megatron-ext report runs/baseline runs/slw --output compare.png
    """
    # matplotlib takes half a second to import, which --help of every command would pay.
    from megatron_ext.metrics.figure import curves_of, draw_runs
    from megatron_ext.metrics.jsonl import read_metrics

    target = output if output is not None else _default_output(runs)
    if target.suffix.lower() != ".png":
        raise UserError(f"--output {target}: the picture is a PNG; give a name that ends in .png")
    curves = []
    for run, label in zip(runs, labels(runs), strict=True):
        metrics = read_metrics(run)
        if not metrics.train:
            raise UserError(f"{run}: metrics.jsonl has no train record yet; wait for the run's first steps")
        curves.append(curves_of(metrics, label))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_runs(curves, target)
    except OSError as error:
        raise UserError(f"--output {target}: cannot be written ({error.strerror}); choose another place") from None
    typer.echo(target)


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
        return Path("report.png")
    return (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.png"
