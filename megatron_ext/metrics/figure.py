"""One picture of one or more runs: loss against tokens and against time, sequence length, learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from megatron_ext.metrics.curves import Curves, Floats, smooth

# Okabe and Ito's palette, which stays distinct for color-blind readers; its yellow is too pale for lines.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_TOKEN_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
_TIME_UNITS = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
_BINS = 1500
"""Raw losses are drawn as their range in so many bins: more cannot be seen, and files stay small."""


@dataclass(frozen=True, slots=True)
class _Unit:
    size: float
    name: str


def draw_runs(runs: Sequence[Curves], output: Path) -> None:
    """Draw the runs over one another and write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    assert runs, "there is a run to draw"
    tokens_unit = _tokens_unit(max(run.tokens[-1] for run in runs))
    time_unit = _time_unit(max(run.seconds[-1] for run in runs))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 8), layout="constrained")
        FigureCanvasAgg(figure)
        by_tokens, by_time, length, rate = figure.subplots(2, 2).flat
        for run, (color, style) in zip(runs, _looks(len(runs)), strict=True):
            tokens = run.tokens / tokens_unit.size
            valid_tokens, valid_time = run.valid_tokens / tokens_unit.size, run.valid_seconds / time_unit.size
            _draw_loss(by_tokens, tokens, valid_tokens, run, color=color, style=style)
            _draw_loss(by_time, run.seconds / time_unit.size, valid_time, run, color=color, style=style)
            lengths = np.concatenate([run.seq_len[:1], run.seq_len])
            length.step(np.concatenate([[0.0], tokens]), lengths, where="pre", color=color, linestyle=style)
            rate.plot(tokens, run.lr, color=color, linestyle=style, marker=_marker(run.lr, at_most=1))
            _mark_resumes(rate, run, tokens_unit, color=color)
        tokens_label = f"tokens ({tokens_unit.name})" if tokens_unit.name else "tokens"
        _label(by_tokens, "Loss against tokens", tokens_label, "loss (nats per token)")
        _label(by_time, "Loss against training time", f"time ({time_unit.name})", "loss (nats per token)")
        _label(length, "Sequence length", tokens_label, "tokens per sequence")
        _label(rate, "Learning rate", tokens_label, "learning rate")
        for axes in (by_tokens, by_time):
            _scale_loss(axes, runs)
        length.set_ylim(bottom=0)
        rate.set_ylim(bottom=0)
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((-2, 4))
        rate.yaxis.set_major_formatter(formatter)
        _add_legends(figure, runs)
        figure.savefig(output, dpi=130, format="png")


def legend_text(label: str) -> str:
    """The label as matplotlib shows it unchanged: its last 60 characters, no mathematics, not hidden."""
    short = label if len(label) <= 60 else "…" + label[-59:]
    plain = short.replace("$", r"\$")
    # matplotlib leaves labels that begin with an underscore out of legends.
    return " " + plain if plain.startswith("_") else plain


def _tokens_unit(largest: float) -> _Unit:
    for size, name in _TOKEN_UNITS:
        if largest >= size:
            return _Unit(size, name)
    return _Unit(1.0, "")


def _time_unit(longest: float) -> _Unit:
    for at_least, size, name in _TIME_UNITS:
        if longest >= at_least:
            return _Unit(size, name)
    return _Unit(1.0, "seconds")


def _draw_loss(axes: Axes, x: Floats, valid_x: Floats, run: Curves, *, color: str, style: str) -> None:
    raw_x, raw_y = _thin(x, run.loss)
    axes.plot(raw_x, raw_y, color=color, alpha=0.35, linewidth=0.7)
    smoothed = smooth(run.loss, half_width=len(run.loss) // 100)
    axes.plot(x, smoothed, color=color, linestyle=style, marker=_marker(smoothed, at_most=1), linewidth=1.5)
    marker = _marker(run.valid_loss, at_most=50)
    axes.plot(valid_x, run.valid_loss, color=color, linestyle="--", marker=marker, markersize=4, linewidth=1.2)
    broken = x[~np.isfinite(run.loss)]
    # Their height is unknown: they stand at the top of the panel.
    axes.plot(broken, np.full(len(broken), 0.98), "x", color=color, transform=axes.get_xaxis_transform(), markersize=6)


def _marker(values: Floats, *, at_most: int) -> str:
    """Marks on the points of a curve of few; on more they would run into one another."""
    return "o" if len(values) <= at_most else ""


def _thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The lowest and the highest point of each bin, so that no spike is lost; non-finite values are left out."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= 2 * _BINS:
        return x, y
    kept = []
    for part in np.array_split(np.arange(len(x)), _BINS):
        kept += sorted({int(part[y[part].argmin()]), int(part[y[part].argmax()])})
    return x[kept], y[kept]


def _mark_resumes(axes: Axes, run: Curves, unit: _Unit, *, color: str) -> None:
    heights = np.interp(run.resume_tokens, run.tokens, run.lr)
    axes.plot(run.resume_tokens / unit.size, heights, "^", color=color, markersize=8, markeredgecolor="white")


def _scale_loss(axes: Axes, runs: Sequence[Curves]) -> None:
    """A logarithmic axis where a diverging run would flatten everything else."""
    finite = [run.loss[np.isfinite(run.loss)] for run in runs]
    values = np.concatenate(finite)
    if len(values) and values.min() > 0 and values.max() > 3 * max(run[0] for run in finite if len(run)):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)


def _add_legends(figure: Figure, runs: Sequence[Curves]) -> None:
    """What the marks mean above the panels, whose color is whose below: inside they would hide curves."""
    gray = "0.3"
    marks = [
        Line2D([], [], color=gray, label="training loss, smoothed"),
        Line2D([], [], color=gray, alpha=0.35, linewidth=0.7, label="training loss, each step"),
    ]
    if any(len(run.valid_loss) for run in runs):
        marks.append(Line2D([], [], color=gray, linestyle="--", marker="o", markersize=4, label="validation loss"))
    if any(not np.isfinite(run.loss).all() for run in runs):
        marks.append(Line2D([], [], color=gray, linestyle="", marker="x", label="loss not finite"))
    if any(len(run.resume_tokens) for run in runs):
        marks.append(Line2D([], [], color=gray, linestyle="", marker="^", markersize=8, label="resumed"))
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    names = [
        Line2D([], [], color=color, linestyle=style, linewidth=3, label=legend_text(run.label))
        for run, (color, style) in zip(runs, _looks(len(runs)), strict=True)
    ]
    longest = max(len(legend_text(run.label)) for run in runs)
    columns = max(1, min(len(runs), 120 // (longest + 8)))
    figure.legend(handles=names, loc="outside lower center", ncols=columns, frameon=False)


def _looks(runs: int) -> list[tuple[str, str]]:
    """A color and a line style for each run; styles change when the colors are used up."""
    styles = ("-", "-.", ":")
    return [(_COLORS[i % len(_COLORS)], styles[i // len(_COLORS) % len(styles)]) for i in range(runs)]
