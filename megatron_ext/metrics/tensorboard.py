"""TensorBoard events, written twice: against steps and against tokens.

With Sequence Length Warmup a step is no fixed amount of data: curves of runs with and without it are comparable
against tokens, so both axes are kept, as two TensorBoard runs of one directory.
"""

from itertools import pairwise
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import EvalRecord, EventRecord, TrainRecord

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


class TensorBoardSink:
    """Writes `directory`/by_step and `directory`/by_tokens.

    Args:
        directory: the run's tensorboard folder.
        step: finished steps that the run goes on from; what an earlier process wrote after them is purged.
        tokens: tokens consumed by those steps.

    Raises:
        UserError: the tensorboard package is not installed.
    """

    def __init__(self, directory: Path, *, step: int, tokens: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"metrics.tensorboard is true but TensorBoard cannot be imported ({error}): "
                "pip install tensorboard, or set metrics.tensorboard to false"
            ) from None
        self._make = SummaryWriter
        self._directory = directory
        self._open(step, tokens)

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
        self._by_step.flush()
        self._by_tokens.flush()

    def roll_back(self, *, step: int, tokens: int) -> None:
        """Go on in new files, which purge what was written after ``step`` and ``tokens``."""
        self.close()
        self._open(step, tokens)

    def close(self) -> None:
        """Write out everything and close both files."""
        self._by_step.close()
        self._by_tokens.close()

    def _open(self, step: int, tokens: int) -> None:
        self._by_step = self._make(str(self._directory / "by_step"), purge_step=step + 1)
        self._by_tokens = self._make(str(self._directory / "by_tokens"), purge_step=tokens + 1)

    def _write(self, values: dict[str, float | None], *, step: int, tokens: int) -> None:
        for tag, value in values.items():
            if value is not None:
                self._by_step.add_scalar(tag, value, step)
                self._by_tokens.add_scalar(tag, value, tokens)
