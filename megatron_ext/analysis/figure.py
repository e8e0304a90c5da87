"""One picture of one or more runs: loss against tokens and against time, sequence length, learning rate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from megatron_ext.analysis.run_data import Floats, RunData, smooth, thin

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
_Units = Sequence[tuple[float, float, str]]
"""(from where on, size, name) of units, largest first."""

_TOKEN_UNITS: _Units = (
    (1e12, 1e12, "trillions"),
    (1e9, 1e9, "billions"),
    (1e6, 1e6, "millions"),
    (1e3, 1e3, "thousands"),
    (0.0, 1.0, ""),
)
_TIME_UNITS: _Units = (
    (2 * 86400.0, 86400.0, "days"),
    (2 * 3600.0, 3600.0, "hours"),
    (120.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
_BINS = 1500
"""Raw losses are drawn as their range in so many bins: more cannot be seen, and files stay small."""


def draw_runs(runs: Sequence[RunData], output: Path) -> None:
    """Draw the runs over one another and write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    assert runs, "there is a run to draw"
    token_size, token_name = _unit(max(run.train["tokens"][-1] for run in runs), _TOKEN_UNITS)
    second_size, time_name = _unit(max(run.train["seconds"][-1] for run in runs), _TIME_UNITS)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(12, 8), layout="constrained")
        by_tokens, by_time, length, rate = figure.subplots(2, 2).flat
        for run, (color, style) in zip(runs, _looks(len(runs)), strict=True):
            look: dict[str, Any] = {"color": color, "linestyle": style}
            _draw_loss(by_tokens, run, "tokens", token_size, look)
            _draw_loss(by_time, run, "seconds", second_size, look)
            tokens, lengths, lr = run.train["tokens"] / token_size, run.train["seq_len"], run.train["lr"]
            length.step(np.append(0.0, tokens), np.append(lengths[:1], lengths), where="pre", **look)
            rate.plot(tokens, lr, marker=_marker(lr, at_most=1), **look)
            resumes = run.resume_tokens / token_size
            rate.plot(resumes, np.interp(resumes, tokens, lr), "^", color=color, markersize=8, markeredgecolor="white")
        tokens_label = f"tokens ({token_name})" if token_name else "tokens"
        _label(by_tokens, "Loss against tokens", tokens_label, "loss (nats per token)")
        _label(by_time, "Loss against training time", f"time ({time_name})", "loss (nats per token)")
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


def _unit(largest: float, units: _Units) -> tuple[float, str]:
    return next((size, name) for at_least, size, name in units if largest >= at_least)


def _draw_loss(axes: Axes, run: RunData, field: str, unit: float, look: Mapping[str, Any]) -> None:
    x, loss, valid_loss = run.train[field] / unit, run.train["loss"], run.valid["loss"]
    raw_x, raw_y = thin(x, loss, _BINS)
    axes.plot(raw_x, raw_y, color=look["color"], alpha=0.35, linewidth=0.7)
    smoothed = smooth(loss, half_width=len(loss) // 100)
    axes.plot(x, smoothed, marker=_marker(smoothed, at_most=1), linewidth=1.5, **look)
    marks: dict[str, Any] = {"marker": _marker(valid_loss, at_most=50), "markersize": 4, "linewidth": 1.2}
    axes.plot(run.valid[field] / unit, valid_loss, color=look["color"], linestyle="--", **marks)
    broken = x[~np.isfinite(loss)]
    # Their height is unknown: they stand at the top of the panel.
    top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "markersize": 6}
    axes.plot(broken, np.full(len(broken), 0.98), "x", color=look["color"], **top)


def _marker(values: Floats, *, at_most: int) -> str:
    """Marks on the points of a curve of few; on more they would run into one another."""
    return "o" if len(values) <= at_most else ""


def _scale_loss(axes: Axes, runs: Sequence[RunData]) -> None:
    """A logarithmic axis where a diverging run would flatten everything else."""
    finite = [run.train["loss"][np.isfinite(run.train["loss"])] for run in runs]
    values = np.concatenate(finite)
    if len(values) and values.min() > 0 and values.max() > 3 * max(run[0] for run in finite if len(run)):
        set_log_scale(axes)


def set_log_scale(axes: Axes) -> None:
    """A logarithmic axis upward whose labels are plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(left=0)


def _add_legends(figure: Figure, runs: Sequence[RunData]) -> None:
    """What the marks mean above the panels, whose color is whose below: inside they would hide curves."""
    gray = "0.3"
    marks = [
        Line2D([], [], color=gray, label="training loss, smoothed"),
        Line2D([], [], color=gray, alpha=0.35, linewidth=0.7, label="training loss, each step"),
    ]
    if any(len(run.valid["loss"]) for run in runs):
        marks.append(Line2D([], [], color=gray, linestyle="--", marker="o", markersize=4, label="validation loss"))
    if any(not np.isfinite(run.train["loss"]).all() for run in runs):
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
