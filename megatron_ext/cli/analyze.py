"""``megatron-ext analyze``: how unstable a run was; and how gradients vary with the sequence length."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_ext.cli.common import AsJson
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.stability.analysis import Analysis, Settings
    from megatron_ext.stability.length_variance import LengthStatistics

_MEASURES = ("adam_var_l1", "adam_var_max")
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
        rows = _by_length(path, lengths=lengths, tokens=tokens, batches=batches, seed=seed)
        _show_lengths(path, rows, as_json=as_json)
        return
    for option, value in (("--lengths", lengths), ("--tokens", tokens)):
        if value is not None:
            raise UserError(f"{option} is given without --by-length: add --by-length, or leave {option} out")
    settings = _settings(threshold, spike=spike, merge=merge, window=window)
    _show_run(path, _analysis(path, settings, from_step=from_step), as_json=as_json)


def _settings(threshold: list[float] | None, *, spike: float, merge: int, window: int) -> "Settings":
    from megatron_ext.stability.analysis import Settings

    for option, value in [("--threshold", value) for value in threshold or ()] + [("--spike", spike)]:
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{option} is {value:g}: write a loss ratio above 0, for example 1.2")
    if not (1 <= window <= _LONGEST_WINDOW and window % 2):
        raise UserError(f"--window is {window}: write an odd number from 1 to {_LONGEST_WINDOW}")
    chosen = {} if threshold is None else {"thresholds": tuple(sorted(set(threshold)))}
    return Settings(**chosen, spike_threshold=spike, merge_gap=merge, window=window)


def _analysis(path: Path, settings: "Settings", *, from_step: int) -> "Analysis":
    from megatron_ext.metrics.columns import read_columns
    from megatron_ext.stability.analysis import Steps, analyze

    columns = read_columns(path, ("step", "tokens", "loss", "loss_ratio", *_MEASURES))
    if not len(columns["step"]):
        raise UserError(f"{path}: metrics.jsonl has no train record yet; wait for the run's first steps")
    steps = Steps.from_columns(columns, _MEASURES)
    last = int(steps.step[-1])
    if from_step > last:
        raise UserError(f"--from-step is {from_step}, and the last step in {path} is {last}: write at most {last}")
    return analyze(steps.since(from_step), settings)


def _show_run(path: Path, analysis: "Analysis", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_json_value({"run": str(path), **asdict(analysis)}), indent=2, allow_nan=False))
        return
    from rich.console import Console

    from megatron_ext.cli.analyze_tables import run_tables

    console = Console(highlight=False)
    for part in run_tables(path, analysis):
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def _by_length(
    path: Path, *, lengths: str | None, tokens: int | None, batches: int, seed: int
) -> list["LengthStatistics"]:
    asked = None if lengths is None else _numbers(lengths)
    # Imports DeepSpeed (to read its files), which asks for the accelerator at once.
    from megatron_ext.runtime.device import select_device
    from megatron_ext.runtime.environment import prepare_libraries, rank_info
    from megatron_ext.runtime.log import configure_logging

    configure_logging(0)
    device = select_device(0)
    prepare_libraries(rank_info(), device.accelerator)

    from megatron_ext.checkpoint.weights import load_model
    from megatron_ext.data.datasets import build_training
    from megatron_ext.stability.length_variance import StudySettings, check_settings, doubling_lengths, study_lengths

    with load_model(path, device) as loaded:
        config, full = loaded.config, loaded.config.training.seq_len
        settings = StudySettings(
            lengths=asked or doubling_lengths(full),
            tokens=4 * full if tokens is None else tokens,
            batches=batches,
            micro_batch_tokens=max(full, config.micro_batch_tokens),
        )
        check_settings(settings, seq_len=full)
        dataset = build_training(
            config.data,
            seq_len=full,
            vocab_size=config.model.vocab_size,
            samples=settings.samples,
            seed=seed,
        )
        return list(study_lengths(loaded.model, dataset, settings, device=device.torch_device))


def _show_lengths(path: Path, rows: list["LengthStatistics"], *, as_json: bool) -> None:
    if as_json:
        told = {"checkpoint": str(path), "lengths": [asdict(row) for row in rows]}
        typer.echo(json.dumps(_json_value(told), indent=2, allow_nan=False))
        return
    from rich.console import Console

    from megatron_ext.cli.analyze_tables import length_tables

    console = Console(highlight=False)
    for part in length_tables(path, rows):
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UserError(f"--lengths is {text!r}: write whole numbers with commas between, like 8,32,128") from None


def _json_value(value: Any) -> Any:
    """The value with what JSON cannot hold spelled out."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
