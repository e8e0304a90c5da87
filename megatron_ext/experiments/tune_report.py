"""What a search found, for people: a page of Markdown with a picture of every probe's validation curve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_ext.analysis.figure import set_log_scale
from megatron_ext.errors import UserError
from megatron_ext.experiments.tune import ProbeResult
from megatron_ext.experiments.tune_search import Candidate
from megatron_ext.experiments.tune_space import ProbeSettings

MARKDOWN, PICTURE = "report.md", "report.png"
_STABLE, _FLUCTUATING, _LIMIT = "#0072B2", "#D55E00", "0.4"
_COLUMNS = 3
_HIGHEST = 20
"""Perplexities are drawn up to so many times the vocabulary's size."""


@dataclass(frozen=True)
class Findings:
    """A search that has ended."""

    results: Sequence[ProbeResult]
    """Its probes in the order in which they were run."""

    settings: ProbeSettings
    vocab_size: int
    """The perplexity of an untrained model, where the best so far begins."""

    best: Candidate | None
    notes: Sequence[str]
    full_tokens: int | None
    """Tokens of the whole run with the tuned curriculum; None where nothing was found."""

    @property
    def tokens(self) -> int:
        """Tokens that all probes trained."""
        return sum(result.verdict.tokens for result in self.results)

    def cost(self) -> str:
        """What the search cost, in one sentence."""
        text = f"{len(self.results)} probes trained {self.tokens:,} tokens"
        if self.full_tokens is None:
            return text
        return f"{text}, {self.tokens / self.full_tokens:.2%} of the tuned run's {self.full_tokens:,}"


def verdict_text(result: ProbeResult) -> str:
    """A probe's verdict in a few words."""
    verdict = result.verdict
    ratio = f"x{verdict.worst_ratio:.2f}" if math.isfinite(verdict.worst_ratio) else "not finite"
    if verdict.fluctuated_at is None:
        return f"no fluctuation (worst {ratio})"
    return f"fluctuated at step {verdict.fluctuated_at:,} (worst {ratio})"


def write_report(folder: Path, findings: Findings) -> Path:
    """Write the page and its picture into ``folder``; returns the page.

    Raises:
        UserError: a file cannot be written.
    """
    page = folder / MARKDOWN
    try:
        _draw(findings, folder / PICTURE)
        page.write_text(_markdown(findings), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page} cannot be written ({error.strerror}): choose another --output") from error
    return page


def _markdown(findings: Findings) -> str:
    best, settings = findings.best, findings.settings
    found = (
        "Nothing was found." if best is None else f"Found: start length s = {best.start}, T = {best.duration:,} steps."
    )
    rows = [
        f"| {number} | {result.candidate.start} | {result.candidate.duration:,} | {verdict_text(result)} | "
        f"{result.verdict.tokens:,} |"
        for number, result in enumerate(findings.results, start=1)
    ]
    lines = [
        "# Tuning of the curriculum",
        "",
        found,
        f"Cost: {findings.cost()}.",
        "",
        f"A probe is the first {settings.steps:,} steps of a run, validated every {settings.validate_every:,} steps on "
        f"{settings.validation_samples:,} full-length sequences. Perplexity above {settings.threshold:g} times the "
        f"best so far (at the start: {findings.vocab_size:,}, the vocabulary's size) counts as a significant "
        "fluctuation, and ends the probe.",
        *(f"\nNote: {note}." for note in findings.notes),
        "",
        "| probe | s | T | verdict | tokens |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"![Validation perplexity of every probe]({PICTURE})",
    ]
    return "\n".join(lines) + "\n"


def _draw(findings: Findings, output: Path) -> None:
    count = len(findings.results)
    columns = min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(12, 1.0 + 2.8 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, axes in enumerate(panels.flat):
            if index >= count:
                axes.set_axis_off()
                continue
            _panel(axes, findings, findings.results[index])
            if index % columns == 0:
                axes.set_ylabel("perplexity")
            if index + columns >= count:
                axes.set_xlabel("step")
                # A shared axis labels only the last row, which may not reach this column.
                axes.tick_params(labelbottom=True)
        ends = [result.points[-1].step for result in findings.results if result.points]
        ends += [result.verdict.fluctuated_at or 0 for result in findings.results]
        panels[0, 0].set_xlim(0, 1.03 * max(1, *ends))
        limit = f"{findings.settings.threshold:g} x the best so far"
        handles = [
            Line2D([], [], color=_STABLE, marker="o", markersize=3, label="validation perplexity, no fluctuation"),
            Line2D([], [], color=_FLUCTUATING, marker="o", markersize=3, label="validation perplexity, fluctuated"),
            Line2D([], [], color=_LIMIT, linestyle="--", label=limit),
            Line2D([], [], color=_FLUCTUATING, marker="X", linestyle="", markersize=8, label="first fluctuation"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        figure.savefig(output, dpi=120, format="png")


def _panel(axes: Axes, findings: Findings, result: ProbeResult) -> None:
    steps = np.array([point.step for point in result.points], dtype=np.float64)
    values = np.array([point.perplexity for point in result.points], dtype=np.float64)
    # What is far above an untrained model would flatten every curve.
    values = np.where(np.isfinite(values), np.minimum(values, _HIGHEST * findings.vocab_size), np.nan)
    color = _STABLE if result.verdict.stable else _FLUCTUATING
    axes.plot(steps, values, color=color, marker="o", markersize=3)
    best = list(accumulate([float(findings.vocab_size), *np.where(np.isnan(values), np.inf, values)], min))
    # What a validation is compared with is drawn from the one before it up to it.
    limit = findings.settings.threshold * np.array([best[0], *best[:-1]])
    axes.plot([0.0, *steps], limit, color=_LIMIT, linestyle="--", drawstyle="steps-pre")
    at = result.verdict.fluctuated_at
    if at is not None:
        known = np.flatnonzero((steps == at) & np.isfinite(values))
        # A perplexity that is not finite has no height: it stands at the top of the panel.
        height, transform = (values[known[0]], axes.transData) if len(known) else (0.96, axes.get_xaxis_transform())
        axes.plot([at], [height], "X", color=_FLUCTUATING, markersize=9, transform=transform)
    axes.set_title(
        f"s = {result.candidate.start}, T = {result.candidate.duration:,}\n{verdict_text(result)}", fontsize=9
    )
    set_log_scale(axes)
