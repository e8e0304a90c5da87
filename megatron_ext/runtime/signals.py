"""What makes a run stop after its step: SIGTERM, SIGINT, SIGUSR1."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedEarlyError(Exception):
    """This process was asked to stop before it had joined the other ranks: there is nothing to save."""


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
    with interrupts_handled(request.receive):
        yield request


@contextmanager
def interrupts_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hand SIGTERM and SIGINT to ``handler`` while the body runs, then restore what was there before."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


_ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what SLURM is asked to send before a job's time is over."""


def catch_stop_signals() -> StopRequest:
    """Catch what asks a rank to stop, from its first moment on: before torch is imported, while it is, and later."""
    request = StopRequest()
    for number in _ASK_TO_STOP:
        signal.signal(number, request.receive)
    return request


def ignore_stop_signals() -> None:
    """Let nothing that asks to stop end a process that has done its work, while the interpreter shuts down.

    Python gives signals that it handles their default back on its way out, but not those that are ignored.
    """
    for number in _ASK_TO_STOP:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block in this thread what asks to stop; a process that is started meanwhile has it blocked for good."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASK_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
