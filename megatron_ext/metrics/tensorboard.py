"""TensorBoard events, written twice: against steps and against tokens.

With Sequence Length Warmup a step is no fixed amount of data: curves of runs with and without it are comparable
against tokens, so both axes are kept, as two TensorBoard runs of one directory.

The files are written here and not by a SummaryWriter, whose thread dies of a full disk, and the run with it. What
cannot be written waits in memory.
"""

import os
import socket
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import EvalRecord, EventRecord, TrainRecord
from megatron_ext.runtime.log import LOGGER

_TAGS = {
    "loss": "train/loss",
    "loss_ratio": "train/loss_ratio",
    "prefix_loss": "train/prefix_loss",
    "grad_norm": "train/grad_norm",
    "adam_var_l1": "train/adam_var_l1",
    "adam_var_max": "train/adam_var_max",
    "lr": "schedule/learning_rate",
    "seq_len": "schedule/sequence_length",
    "batch_size": "schedule/batch_size",
    "step_time_s": "speed/step_time_s",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
}
"""Field of a train record -> name of its curve."""

_FLUSH_SECONDS = 30.0
_MOST_BYTES = 1 << 26
"""Of points that wait for a disk that is full: those of about 100,000 steps; later ones are left out."""


class _EventFile:
    """A file of events in ``folder``; points of this run at or after ``purge_step`` in older files become void."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{os.getpid()}.{rest:09d}"
        self._file = (folder / name).open("xb", buffering=0)
        self._waiting = bytearray()
        self._frame = RecordWriter(self)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def points(self, values: dict[str, float | None], place: int) -> None:
        """Add a point to each curve of which the value is known."""
        known = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        if len(self._waiting) < _MOST_BYTES:
            self._add(step=place, summary=self._summary(value=known))

    def write(self, data: bytes) -> None:
        """Take the bytes of an event; called by ``RecordWriter``."""
        self._waiting += data

    def flush(self) -> None:
        """Write what waits; OSError where that fails, and the rest goes on waiting."""
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        self._frame.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class TensorBoardSink:
    """Writes `directory`/by_step and `directory`/by_tokens; a failure to write costs curves, not the run.

    Args:
        directory: the run's tensorboard folder.
        step: finished steps that the run goes on from; what an earlier process wrote after them is purged.
        tokens: tokens consumed by those steps.

    Raises:
        UserError: the tensorboard package is not installed.
        OSError: the files cannot be made.
    """

    def __init__(self, directory: Path, *, step: int, tokens: int) -> None:
        self._directory = directory
        self._failed = False
        try:
            self._open(step, tokens)
        except ImportError as error:
            raise UserError(
                f"metrics.tensorboard is true but TensorBoard cannot be imported ({error}): "
                "pip install tensorboard, or set metrics.tensorboard to false"
            ) from None

    def train(self, record: TrainRecord) -> None:
        """Write a point of every curve that the step has a value for."""
        values = {tag: getattr(record, name) for name, tag in _TAGS.items()}
        self._write(values, step=record.step, tokens=record.tokens)

    def evaluation(self, record: EvalRecord) -> None:
        """Write the validation loss, overall and by position, and the perplexity."""
        values: dict[str, float | None] = {"validation/loss": record.loss, "validation/perplexity": record.perplexity}
        if record.position_edges is not None and record.position_loss is not None:
            for (first, end), loss in zip(pairwise(record.position_edges), record.position_loss, strict=True):
                values[f"validation_by_position/{first}_to_{end - 1}"] = loss
        self._write(values, step=record.step, tokens=record.tokens)

    def event(self, record: EventRecord) -> None:
        """Write out what is waiting: events are rare, and the run may end after one."""
        del record
        self._flush()

    def roll_back(self, *, step: int, tokens: int) -> None:
        """Go on in new files, which purge what was written after ``step`` and ``tokens``."""
        self.close()
        self._open(step, tokens)

    def close(self) -> None:
        """Write out everything and close both files."""
        self._flush()
        for file in self._files:
            file.close()

    def _open(self, step: int, tokens: int) -> None:
        self._files = (
            _EventFile(self._directory / "by_step", purge_step=step + 1),
            _EventFile(self._directory / "by_tokens", purge_step=tokens + 1),
        )
        self._flush()

    def _write(self, values: dict[str, float | None], *, step: int, tokens: int) -> None:
        for file, place in zip(self._files, (step, tokens), strict=True):
            file.points(values, place)
        if time.monotonic() >= self._flush_at:
            self._flush()

    def _flush(self) -> None:
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        try:
            for file in self._files:
                file.flush()
        except OSError as error:
            if not self._failed:
                self._failed = True
                reason = error.strerror or error
                LOGGER.warning("%s cannot be written (%s): the run goes on without it", self._directory, reason)
