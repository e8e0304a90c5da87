"""What people read while a run goes on: lines in the log; the bar on a terminal is in progress_bar.py."""

import logging

from megatron_ext.metrics.records import EvalRecord, EventRecord, TrainRecord
from megatron_ext.text import format_count, format_duration

_HALF_LIFE_S = 30.0
_HALF_LIFE_STEPS = 10.0


class TokenRate:
    """Recent tokens per second of training: recent tokens over the recent time.

    Both sums forget a step by half within 30 s of later steps or 10 later steps, whichever is longer: fast steps do
    not make the rate jump, slow ones do not make it the rate of the last step alone. A ratio of sums stays right while
    the length grows, where the mean of the steps' rates would weigh a short step like a long one.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, *, tokens: float, seconds: float) -> None:
        """Count a step of so many tokens that took so many seconds."""
        assert seconds >= 0, f"a step cannot take {seconds} s"
        kept = max(0.5 ** (seconds / _HALF_LIFE_S), 0.5 ** (1 / _HALF_LIFE_STEPS))
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """None before the first step."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def seconds_left(self, tokens: int) -> float | None:
        """Seconds that so many tokens take at the recent rate; None where there is no rate yet."""
        rate = self.tokens_per_s
        return max(0, tokens) / rate if rate else None


class LogLines:
    """Lines in the log: one every `log_every` steps and at the last, each validation, each event.

    Args:
        logger: where they go.
        log_every: steps between lines.
        total_tokens: tokens of the whole run.
    """

    def __init__(
        self, logger: "logging.Logger | logging.LoggerAdapter[logging.Logger]", *, log_every: int, total_tokens: int
    ) -> None:
        self._logger = logger
        self._every = log_every
        self._total = total_tokens
        self._rate = TokenRate()

    def train(self, record: TrainRecord) -> None:
        """Log the step where it is due."""
        self._rate.add(tokens=record.batch_size * record.seq_len, seconds=record.step_time_s)
        if record.step % self._every == 0 or record.tokens >= self._total:
            self._logger.info("%s", train_line(record, rate=self._rate, total_tokens=self._total))

    def evaluation(self, record: EvalRecord) -> None:
        """Log a validation."""
        self._logger.info("%s", evaluation_line(record))

    def event(self, record: EventRecord) -> None:
        """Log an event."""
        self._logger.info("%s", event_line(record))

    def roll_back(self, *, step: int, tokens: int) -> None:
        """Lines stay; the event says what happened."""

    def close(self) -> None:
        """Nothing to close: the logger is its owner's."""


def train_line(record: TrainRecord, *, rate: TokenRate, total_tokens: int) -> str:
    """One line about a step."""
    grad_norm = "?" if record.grad_norm is None else f"{record.grad_norm:.3f}"
    parts = [
        f"step {record.step:,}",
        f"tokens {format_count(record.tokens)}/{format_count(total_tokens)} ({record.tokens / total_tokens:.1%})",
        f"length {record.seq_len}",
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.3e}",
        f"grad norm {grad_norm}",
        f"{format_count(rate.tokens_per_s or 0.0)} tokens/s",
        f"ETA {format_duration(rate.seconds_left(total_tokens - record.tokens))}",
    ]
    return " | ".join([*parts, "update skipped"] if record.skipped else parts)


def evaluation_line(record: EvalRecord) -> str:
    """One line about a validation."""
    return (
        f"validation after step {record.step:,} ({format_count(record.tokens)} tokens): "
        f"loss {record.loss:.4f}, perplexity {record.perplexity:.2f}"
    )


def event_line(record: EventRecord) -> str:
    """One line about an event."""
    details = ", ".join(f"{name} {value}" for name, value in record.details.items())
    return f"{record.name}: {details}" if details else record.name
