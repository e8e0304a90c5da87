"""One self-contained HTML file about one or more runs: curves to read values off, and a table. No network.

The page holds the curves as JSON and a script that draws them as SVG at the width that the window has, so that labels
stay legible on a phone; the table is plain HTML and is there without the script too.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.analysis.comparison import Comparison, compare
from megatron_ext.analysis.run_data import Floats, RunData, sampled, smooth, thin
from megatron_ext.curriculum.guards import THRESHOLDS
from megatron_ext.errors import UserError

_MARKS = 60
"""Steps with a non-finite loss that are marked, at most, per run."""


@dataclass(frozen=True)
class _Panel:
    field: str
    title: str
    unit: str
    x: str = "tokens"
    """Field on the horizontal axis: tokens or seconds."""

    points: bool = False
    """The field is of validations, which are drawn with a mark on each."""

    smoothed: bool = False
    """Also drawn as a smooth line, with the steps themselves paler behind it."""

    zero: bool = False
    """The axis begins at 0 and is never logarithmic."""

    thresholds: bool = False
    """Lines at the thresholds of the loss ratio."""


_PANELS = (
    _Panel("loss", "Training loss against tokens", "nats per token", smoothed=True),
    _Panel("loss", "Training loss against time", "nats per token", x="seconds", smoothed=True),
    _Panel("loss", "Validation loss", "nats per token, at full length", points=True),
    _Panel("prefix_loss", "Loss over the first tokens", "nats per token", smoothed=True),
    _Panel("loss_ratio", "Loss ratio", "loss over the lowest before", thresholds=True),
    _Panel("seq_len", "Sequence length", "tokens", zero=True),
    _Panel("batch_size", "Batch size", "sequences", zero=True),
    _Panel("lr", "Learning rate", "", zero=True),
    _Panel("adam_var_l1", "Gradient variance, norm", "l1 norm of Adam's √v"),
    _Panel("adam_var_max", "Gradient variance, maximum", "largest of Adam's √v"),
    _Panel("grad_norm", "Gradient norm", "before clipping", smoothed=True),
    _Panel("tokens_per_s", "Throughput", "tokens per second", zero=True, smoothed=True),
    _Panel("peak_memory_gib", "Peak memory", "GiB on rank 0", zero=True),
)


def write_report(runs: Sequence[RunData], output: Path, *, title: str, target_loss: float | None = None) -> Comparison:
    """Write the HTML report of ``runs`` and return its table.

    Args:
        runs: At least one; the others are compared with the first.
        output: The page; its folder is made where it is missing.
        title: Heading of the page.
        target_loss: Validation loss (nats per token) to which tokens and time are counted; by default the first run's.

    Raises:
        UserError: the target is no loss, or the file cannot be written.
    """
    if target_loss is not None and not (math.isfinite(target_loss) and target_loss > 0):
        raise UserError(f"--target-loss is {target_loss:g}: give a validation loss above 0, in nats per token")
    comparison = compare(runs, target=target_loss)
    page = report_page(runs, comparison, title=title)
    with _written(output):
        output.write_text(page, encoding="utf-8")
    return comparison


def write_picture(runs: Sequence[RunData], output: Path) -> None:
    """Write a PNG of the main curves; UserError where it cannot be written."""
    # The page does without matplotlib, which takes half a second to import.
    from megatron_ext.analysis.figure import draw_runs

    with _written(output):
        draw_runs(runs, output)


@contextmanager
def _written(output: Path) -> Iterator[None]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another place") from None


def run_labels(runs: Sequence[Path]) -> list[str]:
    """A name for each run: the shortest end of its path that tells all of them apart."""
    folders = [run.resolve() if run.is_dir() else run.resolve().parent for run in runs]
    if len(set(folders)) < len(folders):
        # The same folder twice, or two files of one folder: only the whole paths can differ.
        return [str(run) for run in runs]
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def report_page(runs: Sequence[RunData], comparison: Comparison, *, title: str) -> str:
    """The HTML of a report.

    Args:
        runs: At least one; runs of one group are drawn in one color.
        comparison: Their table.
        title: Heading of the page.
    """
    bins = int(np.clip(3500 // len(runs), 100, 700))
    panels = [drawn for panel in _PANELS if (drawn := _panel_json(panel, runs, bins=bins)) is not None]
    groups = list(dict.fromkeys(run.group for run in runs))
    data = {
        "groups": groups,
        "runs": [{"label": run.label, "group": groups.index(run.group)} for run in runs],
        "thresholds": THRESHOLDS,
        "panels": panels,
    }
    parts = {
        "TITLE": escape(title),
        "STYLE": _template("report.css"),
        "SCRIPT": _template("report.js"),
        "DATA": _embedded(data),
        "TABLE": _table(comparison),
        "NOTES": escape(" ".join(comparison.notes())),
        "ABSENT": escape(_absent(panels)),
    }
    page = _template("report.html")
    # In one pass: a name in the data may look like a placeholder.
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[piece.split("}}", 1)[0]] + piece.split("}}", 1)[1] for piece in pieces[1:])


def _template(name: str) -> str:
    return resources.files("megatron_ext.analysis").joinpath("templates", name).read_text(encoding="utf-8")


def _embedded(data: dict[str, Any]) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _panel_json(panel: _Panel, runs: Sequence[RunData], *, bins: int) -> dict[str, Any] | None:
    """What the script draws; None where no run has the field, or no batch size changes."""
    series = [_series(panel, run, bins=bins) for run in runs]
    if not any(item["y"] for item in series):
        return None
    if panel.field == "batch_size" and not any(len(set(item["y"])) > 1 for item in series):
        return None
    return asdict(panel) | {"series": series}


def _series(panel: _Panel, run: RunData, *, bins: int) -> dict[str, Any]:
    columns = run.valid if panel.points else run.train
    x, y = columns[panel.x], columns[panel.field]
    kept_x, kept_y = thin(x, y, bins)
    series: dict[str, Any] = {"x": _numbers(kept_x), "y": _numbers(kept_y)}
    if panel.smoothed:
        smooth_x, smooth_y = sampled(x, smooth(y, half_width=max(1, len(y) // 60)), max(60, bins // 2))
        series |= {"sx": _numbers(smooth_x), "sy": _numbers(smooth_y)}
    if panel.field in {"loss", "loss_ratio"}:
        broken = np.flatnonzero(~np.isfinite(run.train["loss"] if not panel.points else y))
        if len(broken) > _MARKS:
            broken = broken[np.linspace(0, len(broken) - 1, _MARKS).astype(np.int64)]
        series["broken"] = _numbers(x[broken])
    return series


def _numbers(values: Floats) -> list[float]:
    """Six significant digits, whole numbers without a point: more cannot be seen, and costs bytes."""
    return [int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}") for value in values]


def _absent(panels: Sequence[dict[str, Any]]) -> str:
    drawn = {panel["title"] for panel in panels}
    absent = [panel.title.lower() for panel in _PANELS if panel.title not in drawn and panel.field != "batch_size"]
    return f"Not recorded by these runs: {', '.join(absent)}." if absent else ""


def _table(comparison: Comparison) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in comparison.headings)
    rows = [
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in comparison.rows
    ]
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
