"""``megatron-ext analyze``: how unstable a run was; and how gradients vary with the sequence length."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ext.cli.common import AsJson
from megatron_ext.errors import UserError
from megatron_ext.text import spell_non_finite

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_ext.analysis.statistics import AnalysisSettings

_LONGEST_WINDOW = 1001


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
        from megatron_ext.analysis.tables import length_tables

        chosen = None if lengths is None else _numbers(lengths)
        rows = study_checkpoint(path, lengths=chosen, tokens=tokens, batches=batches, seed=seed)
        values = {"checkpoint": str(path), "lengths": [asdict(row) for row in rows]}
        _show(values, length_tables(path, rows), as_json=as_json)
        return
    for option, value in (("--lengths", lengths), ("--tokens", tokens)):
        if value is not None:
            raise UserError(f"{option} is given without --by-length: add --by-length, or leave {option} out")
    from megatron_ext.analysis.statistics import Steps, analyze
    from megatron_ext.analysis.tables import run_tables

    settings = _settings(threshold, spike=spike, merge=merge, window=window)
    analysis = analyze(Steps.read(path, from_step=from_step), settings)
    _show({"run": str(path), **asdict(analysis)}, run_tables(path, analysis), as_json=as_json)


def _settings(threshold: list[float] | None, *, spike: float, merge: int, window: int) -> "AnalysisSettings":
    from megatron_ext.analysis.statistics import AnalysisSettings

    for option, value in [("--threshold", value) for value in threshold or ()] + [("--spike", spike)]:
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{option} is {value:g}: write a loss ratio above 0, for example 1.2")
    if not (1 <= window <= _LONGEST_WINDOW and window % 2):
        raise UserError(f"--window is {window}: write an odd number from 1 to {_LONGEST_WINDOW}")
    chosen = {} if threshold is None else {"thresholds": tuple(sorted(set(threshold)))}
    return AnalysisSettings(**chosen, spike_threshold=spike, merge_gap=merge, window=window)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--lengths is {text!r}: write whole numbers with commas between, like 8,32,128") from None


def _show(values: dict[str, Any], parts: "Iterable[Table | str]", *, as_json: bool) -> None:
    """Print the values as JSON, or what says the same for people."""
    if as_json:
        typer.echo(json.dumps(spell_non_finite(values), indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)
