"""The progress bar of a run on a terminal."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from megatron_ext.metrics.console import TokenRate, evaluation_line, event_line
from megatron_ext.metrics.records import EvalRecord, EventRecord, TrainRecord
from megatron_ext.text import format_count, format_duration


class ProgressBar:
    """One line that shows tokens done and to do, length, loss, speed and time left; validations scroll above it.

    Args:
        console: where it is drawn; whoever else writes to that terminal has to go through the same console.
        total_tokens: tokens of the whole run.
        tokens: tokens that the run goes on from.
    """

    def __init__(self, console: Console, *, total_tokens: int, tokens: int) -> None:
        self._total = total_tokens
        self._rate = TokenRate()
        self._progress = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            # It is drawn by a thread of the training process.
            refresh_per_second=2,
        )
        start = f"{format_count(tokens)}/{format_count(total_tokens)} tok"
        self._task = self._progress.add_task("", total=total_tokens, completed=tokens, status=start)
        self._progress.start()

    def train(self, record: TrainRecord) -> None:
        """Move the bar."""
        self._rate.add(tokens=record.batch_size * record.seq_len, seconds=record.step_time_s)
        status = " · ".join(
            [
                f"{format_count(record.tokens)}/{format_count(self._total)} tok",
                f"len {record.seq_len}",
                f"loss {record.loss:.3f}",
                f"{format_count(self._rate.tokens_per_s or 0.0)} tok/s",
                f"ETA {format_duration(self._rate.seconds_left(self._total - record.tokens))}",
            ]
        )
        self._progress.update(self._task, completed=record.tokens, status=status)

    def evaluation(self, record: EvalRecord) -> None:
        """Print a validation above the bar."""
        self._progress.console.print(evaluation_line(record), highlight=False, markup=False)

    def event(self, record: EventRecord) -> None:
        """Print an event above the bar."""
        self._progress.console.print(event_line(record), highlight=False, markup=False)

    def roll_back(self, *, step: int, tokens: int) -> None:
        """Move the bar back."""
        del step
        self._progress.update(self._task, completed=tokens)

    def close(self) -> None:
        """Leave the bar where it is and give the terminal back."""
        self._progress.stop()
