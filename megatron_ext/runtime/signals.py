"""SIGTERM and SIGINT as a wish to stop after the current step, instead of an exception in the middle of it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Remembers the first signal that asked this process to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal_name is not None

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Take a signal: the handler that ``stop_on_signal`` installs."""
        self.signal_name = self.signal_name or signal.Signals(number).name


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT while the body runs, then restore what was there before."""
    request = StopRequest()
    caught = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, request.receive) for number in caught}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
