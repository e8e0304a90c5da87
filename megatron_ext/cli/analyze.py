"""``megatron-ext analyze``: how unstable a run was; and how gradients vary with the sequence length."""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ext.cli.common import AsJson, table, whole_numbers
from megatron_ext.errors import UserError
from megatron_ext.text import format_count, spell_non_finite

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ext.analysis.length_study import LengthStatistics
    from megatron_ext.analysis.statistics import (
        Analysis,
        AnalysisSettings,
        Correlation,
        RatioTable,
        Reading,
        Spike,
        StepPoint,
    )

_table = functools.partial(table, no_wrap=False)
_LONGEST_WINDOW = 1001
_SPIKES = 10
"""Spikes that are shown; JSON has all of them."""


def command(
    path: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory or metrics.jsonl; with --by-length also a checkpoint.")
    ],
    *,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            help="Count steps with a loss ratio above this; may be repeated.", show_default="1.1, 1.2, 1.5 and 2"
        ),
    ] = None,
    spike: Annotated[float, typer.Option(help="Loss ratio above which a step belongs to a spike.")] = 1.2,
    merge: Annotated[int, typer.Option(min=0, help="Spikes with at most this many steps between them are one.")] = 10,
    window: Annotated[int, typer.Option(help="Steps of the running median that smooths the loss; odd.")] = 11,
    from_step: Annotated[int, typer.Option(min=1, help="Leave out the steps before this one.")] = 1,
    by_length: Annotated[
        bool, typer.Option("--by-length", help="Measure gradient variance by sequence length from a checkpoint.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="By length: lengths with commas between.", show_default="8, 16, 32, ..., full")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="By length: tokens of each batch at every length.", show_default="4 full sequences"),
    ] = None,
    batches: Annotated[int, typer.Option(min=2, help="By length: batches at every length.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="By length: of the order of samples.")] = 1234,
    as_json: AsJson = False,
) -> None:
    """Tell how unstable a run was: loss ratios, Adam's variance and how both correlate, spikes and recovery.

    Works on a run that still goes on, or was killed. With --by-length: the variance of gradients at several sequence
    lengths, between batches of the same number of tokens, under the weights of a checkpoint (best one early in
    training). In JSON, numbers that are not finite are the strings "inf" and "nan".

    Example: megatron-ext analyze runs/baseline --threshold 1.3; megatron-ext analyze runs/baseline --by-length
    """
    if by_length:
        from megatron_ext.analysis.length_study import study_checkpoint

        chosen = None if lengths is None else tuple(sorted(set(whole_numbers("--lengths", lengths))))
        rows = study_checkpoint(path, lengths=chosen, tokens=tokens, batches=batches, seed=seed)
        values = {"checkpoint": str(path), "lengths": [asdict(row) for row in rows]}
        _show(values, _length_tables(path, rows), as_json=as_json)
        return
    for option, value in (("--lengths", lengths), ("--tokens", tokens)):
        if value is not None:
            raise UserError(f"{option} is given without --by-length: add --by-length, or leave {option} out")
    from megatron_ext.analysis.statistics import Steps, analyze

    settings = _settings(threshold, spike=spike, merge=merge, window=window)
    analysis = analyze(Steps.read(path, from_step=from_step), settings)
    _show({"run": str(path), **asdict(analysis)}, _run_tables(path, analysis), as_json=as_json)


def _settings(threshold: list[float] | None, *, spike: float, merge: int, window: int) -> "AnalysisSettings":
    from megatron_ext.analysis.statistics import AnalysisSettings

    for option, value in [("--threshold", value) for value in threshold or ()] + [("--spike", spike)]:
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{option} is {value:g}: write a loss ratio above 0, for example 1.2")
    if not (1 <= window <= _LONGEST_WINDOW and window % 2):
        raise UserError(f"--window is {window}: write an odd number from 1 to {_LONGEST_WINDOW}")
    chosen = {} if threshold is None else {"thresholds": tuple(sorted(set(threshold)))}
    return AnalysisSettings(**chosen, spike_threshold=spike, merge_gap=merge, window=window)


def _show(values: dict[str, Any], parts: "Iterable[Table | str]", *, as_json: bool) -> None:
    """Print the values as JSON, or what says the same for people."""
    if as_json:
        typer.echo(json.dumps(spell_non_finite(values), indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def _run_tables(path: Path, analysis: "Analysis") -> "Iterator[Table | str]":
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


def _length_tables(path: Path, rows: Sequence["LengthStatistics"]) -> "Iterator[Table | str]":
    first = rows[0]
    yield f"{path}: {first.batches} batches of {first.tokens:,} tokens at each length, no dropout, weights unchanged"
    shown = _table("length", "batch", "loss", "norm", "std l1", "std max", "signal/noise")
    for row in rows:
        values = (row.loss, row.grad_norm, row.std_l1, row.std_max, row.signal_to_noise)
        shown.add_row(f"{row.seq_len:,}", f"{row.sequences:,}", *(f"{value:.4g}" for value in values))
    yield shown
    shown = _table("length", "largest norm", "largest element", "largest std is in")
    for row in rows:
        worst = row.outliers[0]
        shown.add_row(f"{row.seq_len:,}", f"{row.largest_grad_norm:.4g}", f"{row.largest_element:.4g}", worst.parameter)
    yield shown


def _ratio_table(title: str, ratios: "RatioTable") -> "Iterator[Table | str]":
    yield f"{title}: largest {ratios.largest:.4g} at step {ratios.at.step:,} ({ratios.at.tokens:,} tokens)"
    shown = _table("above", "steps", "share", "first step", "at tokens", "last step", "at tokens")
    for row in ratios.rows:
        shown.add_row(f"{row.threshold:g}", f"{row.count:,}", f"{row.share:.3%}", *_at(row.first), *_at(row.last))
    yield shown


def _variance_table(analysis: "Analysis") -> "Table":
    shown = _table("measure", "", "value", "step", "tokens")
    for row in analysis.variance:
        for name in ("first", "min", "max", "last"):
            reading: Reading = getattr(row, name)
            shown.add_row(row.measure, name, f"{reading.value:.4g}", *_at(reading.at))
    return shown


def _correlation_table(correlations: Sequence["Correlation"]) -> "Table":
    shown = _table("measure", "ratio of", "n", "r", "p")
    for row in correlations:
        of = "smoothed loss" if row.smoothed else "loss"
        if row.undefined is not None:
            shown.add_row(row.measure, of, f"{row.n:,}", "none", row.undefined)
        else:
            shown.add_row(row.measure, of, f"{row.n:,}", f"{row.r:.4f}", f"{row.p:.3g}")
    return shown


def _spikes(analysis: "Analysis") -> "Iterator[Table | str]":
    spikes, above = analysis.spikes, f"loss ratio above {analysis.spike_threshold:g}"
    if not spikes:
        yield f"No spikes ({above})"
        return
    never = sum(spike.recovered is None for spike in spikes)
    highest = sorted(sorted(spikes, key=lambda spike: -spike.peak_ratio)[:_SPIKES], key=lambda spike: spike.start.step)
    only = f", the {len(highest)} highest shown" if len(highest) < len(spikes) else ""
    number = "1 spike" if len(spikes) == 1 else f"{len(spikes):,} spikes"
    yield f"{number} ({above}), {never:,} not recovered{only}"
    shown = _table("start", "at tokens", "steps", "peak", "at step", "back after steps", "tokens")
    for spike in highest:
        peak = (f"{spike.peak_ratio:.4g}", f"{spike.peak.step:,}")
        shown.add_row(*_at(spike.start), f"{spike.steps:,}", *peak, *_recovery(spike))
    yield shown


def _recovery(spike: "Spike") -> tuple[str, str]:
    if spike.level is None:
        return "no loss before it", "-"
    if spike.recovery_steps is None:
        return "not recovered", "-"
    assert spike.recovery_tokens is not None
    return f"{spike.recovery_steps:,}", format_count(spike.recovery_tokens)


def _at(place: "StepPoint | None") -> tuple[str, str]:
    return ("-", "-") if place is None else (f"{place.step:,}", format_count(place.tokens))
