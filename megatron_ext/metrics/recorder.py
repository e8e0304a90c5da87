"""One place that the loop reports to; where the values go was decided when it was made."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from megatron_ext.config.training import MetricsConfig
from megatron_ext.metrics.console import LogLines
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.records import FILE_NAME, EvalRecord, EventRecord, TrainRecord
from megatron_ext.runtime.log import file_only


class Sink(Protocol):
    """Somewhere that records go."""

    def train(self, record: TrainRecord) -> None:
        """Take a step."""

    def evaluation(self, record: EvalRecord) -> None:
        """Take a validation."""

    def event(self, record: EventRecord) -> None:
        """Take an event."""

    def roll_back(self, *, step: int, tokens: int) -> None:
        """Take back the steps and validations after ``step`` finished steps and ``tokens``: others will follow."""

    def close(self) -> str | None:
        """Write out everything, nothing comes after; what could not be written and matters, in words."""


class Recorder:
    """Hands every record to all sinks, in order. Without sinks it does nothing: what ranks other than 0 have."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = tuple(sinks)

    def train(self, record: TrainRecord) -> None:
        """Record a step."""
        for sink in self._sinks:
            sink.train(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Record a validation."""
        for sink in self._sinks:
            sink.evaluation(record)

    def event(self, name: str, **details: object) -> None:
        """Record an event (resume, checkpoint, preemption, rollback) with details that are JSON values."""
        record = EventRecord(name, details)
        for sink in self._sinks:
            sink.event(record)

    def roll_back(self, *, step: int, tokens: int) -> None:
        """Take back what was recorded after ``step`` finished steps and ``tokens`` consumed ones, events excepted."""
        for sink in self._sinks:
            sink.roll_back(step=step, tokens=tokens)

    def close(self) -> str | None:
        """Close all sinks; what of the metrics could not be written, in words, or None."""
        return "; ".join(lacks for sink in self._sinks if (lacks := sink.close())) or None


def open_sinks(
    run_dir: Path,
    config: MetricsConfig,
    *,
    total_tokens: int,
    step: int,
    tokens: int,
    console: Console,
) -> list[Sink]:
    """The sinks of rank 0 for a run that goes on from `step` finished steps and `tokens` consumed ones (0, 0: new).

    What an earlier process recorded after that step is dropped, events excepted. This module's logger
    gets lines; where `console` is a terminal it shows a progress bar instead, and the lines are for the log file alone.

    Raises:
        UserError: metrics.jsonl of the directory is broken, or TensorBoard is wanted and not installed.
        OSError: one of the files cannot be opened.
    """
    jsonl = JsonlSink(run_dir / FILE_NAME)
    jsonl.rewind(step)
    sinks: list[Sink] = [jsonl]
    if config.tensorboard:
        from megatron_ext.metrics.tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(run_dir / "tensorboard", step=step, tokens=tokens))
    logger = logging.getLogger(__name__)
    if console.is_terminal:
        from megatron_ext.metrics.progress_bar import ProgressBar

        sinks.append(ProgressBar(console, total_tokens=total_tokens, tokens=tokens))
    lines = file_only(logger) if console.is_terminal else logger
    return [*sinks, LogLines(lines, log_every=config.log_every, total_tokens=total_tokens)]
