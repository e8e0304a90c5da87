"""A background thread that computes the items of a sequence ahead of their use."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

_STOP_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _Made(Generic[T]):
    value: T


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class Prefetcher(Generic[T]):
    """Calls ``produce`` on each of ``items`` in order, about ``depth`` results ahead of :meth:`next`.

    The thread ends after the last item, after an error, on :meth:`close`, and when the prefetcher is garbage.
    """

    def __init__(self, produce: Callable[[int], T], items: Iterable[int], *, depth: int) -> None:
        assert depth > 0
        self._ready: queue.Queue[_Made[T] | _Failed] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # The thread knows the queue and the event, not the prefetcher: it must not keep alive what would stop it.
        self._thread = threading.Thread(
            target=_work, args=(produce, items, self._ready, self._stop), name="prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def next(self) -> T:
        """The next item's result. What ``produce`` raised for it is raised here, with the traceback of the thread.

        Not to be called after an error or more often than there are items.
        """
        result = self._ready.get()
        if isinstance(result, _Failed):
            raise result.error
        return result.value

    def close(self) -> None:
        """Stop the thread and wait for it; at most one ``produce`` call is waited for."""
        self._stop.set()
        self._thread.join()


def _work(
    produce: Callable[[int], T],
    items: Iterable[int],
    ready: "queue.Queue[_Made[T] | _Failed]",
    stop: threading.Event,
) -> None:
    for item in items:
        result: _Made[T] | _Failed
        try:
            result = _Made(produce(item))
        except BaseException as error:
            result = _Failed(error)
        while not stop.is_set():
            try:
                ready.put(result, timeout=_STOP_POLL_SECONDS)
            except queue.Full:
                continue
            break
        if stop.is_set() or isinstance(result, _Failed):
            return
