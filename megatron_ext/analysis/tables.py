"""What ``analyze`` shows on a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from megatron_ext.analysis.statistics import Analysis, Correlation, RatioTable, Reading, Spike, StepPoint
from megatron_ext.text import format_count

if TYPE_CHECKING:
    from megatron_ext.analysis.length_study import LengthStatistics


_SPIKES = 10
"""Spikes that are shown; JSON has all of them."""


def run_tables(path: Path, analysis: Analysis) -> Iterator[Table | str]:
    """Lines and tables about a run, in reading order."""
    yield f"{path}: steps {analysis.first.step:,} to {analysis.last.step:,}, {analysis.last.tokens:,} tokens consumed"
    if analysis.missing_steps:
        yield f"{analysis.missing_steps:,} steps between them are not in the file"
    if analysis.non_finite_losses:
        yield f"the loss was not finite on {analysis.non_finite_losses:,} steps; their loss ratio counts as infinite"
    yield from _ratio_table("Loss ratio (loss over the lowest before it)", analysis.ratio)
    title = f"Loss ratio of the loss smoothed by a running median over {analysis.window} steps"
    yield from _ratio_table(title, analysis.smoothed_ratio)
    if analysis.variance:
        yield "Adam's variance: l1 norm and largest element of sqrt(v)"
        yield _variance_table(analysis)
        yield "Pearson's r with the loss ratio, on the steps where the variance was measured"
        yield _correlation_table(analysis.correlations)
    else:
        yield "Adam's variance was not measured in this file: nothing to correlate with the loss ratio"
    yield from _spikes(analysis)


def length_tables(path: Path, rows: Sequence["LengthStatistics"]) -> Iterator[Table | str]:
    """Lines and tables about gradients by length."""
    first = rows[0]
    yield f"{path}: {first.batches} batches of {first.tokens:,} tokens at each length, no dropout, weights unchanged"
    table = _table("length", "batch", "loss", "norm", "std l1", "std max", "signal/noise")
    for row in rows:
        values = (row.loss, row.grad_norm, row.std_l1, row.std_max, row.signal_to_noise)
        table.add_row(f"{row.seq_len:,}", f"{row.sequences:,}", *(f"{value:.4g}" for value in values))
    yield table
    table = _table("length", "largest norm", "largest element", "largest std is in")
    for row in rows:
        worst = row.outliers[0]
        table.add_row(f"{row.seq_len:,}", f"{row.largest_grad_norm:.4g}", f"{row.largest_element:.4g}", worst.parameter)
    yield table


def _ratio_table(title: str, ratios: RatioTable) -> Iterator[Table | str]:
    yield f"{title}: largest {ratios.largest:.4g} at step {ratios.at.step:,} ({ratios.at.tokens:,} tokens)"
    table = _table("above", "steps", "share", "first step", "at tokens", "last step", "at tokens")
    for row in ratios.rows:
        table.add_row(f"{row.threshold:g}", f"{row.count:,}", f"{row.share:.3%}", *_at(row.first), *_at(row.last))
    yield table


def _variance_table(analysis: Analysis) -> Table:
    table = _table("measure", "", "value", "step", "tokens")
    for row in analysis.variance:
        for name in ("first", "min", "max", "last"):
            reading: Reading = getattr(row, name)
            table.add_row(row.measure, name, f"{reading.value:.4g}", *_at(reading.at))
    return table


def _correlation_table(correlations: Sequence[Correlation]) -> Table:
    table = _table("measure", "ratio of", "n", "r", "p")
    for row in correlations:
        of = "smoothed loss" if row.smoothed else "loss"
        if row.undefined is not None:
            table.add_row(row.measure, of, f"{row.n:,}", "none", row.undefined)
        else:
            table.add_row(row.measure, of, f"{row.n:,}", f"{row.r:.4f}", f"{row.p:.3g}")
    return table


def _spikes(analysis: Analysis) -> Iterator[Table | str]:
    spikes, above = analysis.spikes, f"loss ratio above {analysis.spike_threshold:g}"
    if not spikes:
        yield f"No spikes ({above})"
        return
    never = sum(spike.recovered is None for spike in spikes)
    highest = sorted(sorted(spikes, key=lambda spike: -spike.peak_ratio)[:_SPIKES], key=lambda spike: spike.start.step)
    shown = f", the {len(highest)} highest shown" if len(highest) < len(spikes) else ""
    number = "1 spike" if len(spikes) == 1 else f"{len(spikes):,} spikes"
    yield f"{number} ({above}), {never:,} not recovered{shown}"
    table = _table("start", "at tokens", "steps", "peak", "at step", "back after steps", "tokens")
    for spike in highest:
        peak = (f"{spike.peak_ratio:.4g}", f"{spike.peak.step:,}")
        table.add_row(*_at(spike.start), f"{spike.steps:,}", *peak, *_recovery(spike))
    yield table


def _recovery(spike: Spike) -> tuple[str, str]:
    if spike.level is None:
        return "no loss before it", "-"
    if spike.recovery_steps is None:
        return "not recovered", "-"
    assert spike.recovery_tokens is not None
    return f"{spike.recovery_steps:,}", format_count(spike.recovery_tokens)


def _at(place: StepPoint | None) -> tuple[str, str]:
    return ("-", "-") if place is None else (f"{place.step:,}", format_count(place.tokens))


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right")
    return table
