"""The prefetch thread: order, bounds, errors with their traceback, and no thread left over."""

import gc
import threading
import time
import traceback

import pytest

from megatron_ext.data.loader import Prefetcher


def _wait_until(condition: object, seconds: float = 10.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_results_come_in_order() -> None:
    prefetcher = Prefetcher(lambda n: n * n, range(100), depth=3)
    assert [prefetcher.next() for _ in range(100)] == [n * n for n in range(100)]
    prefetcher.close()
    assert _threads() == 0


def test_work_ahead_is_bounded() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(made.append, range(100), depth=3)
    _wait_until(lambda: len(made) == 4)  # three wait, a fourth is in the thread's hands
    time.sleep(0.05)
    assert len(made) == 4
    prefetcher.next()
    _wait_until(lambda: len(made) == 5)
    prefetcher.close()
    assert _threads() == 0


def _fail_at_three(n: int) -> int:
    if n == 3:
        raise ZeroDivisionError("three")
    return n


def test_error_is_raised_in_its_turn_with_the_traceback_of_the_thread() -> None:
    prefetcher = Prefetcher(_fail_at_three, range(10), depth=2)
    assert [prefetcher.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="three") as caught:
        prefetcher.next()
    assert "_fail_at_three" in "".join(traceback.format_tb(caught.value.__traceback__))
    prefetcher.close()
    assert _threads() == 0


def test_forgotten_prefetcher_ends_its_thread() -> None:
    prefetcher = Prefetcher(lambda n: n, range(1000), depth=1)
    prefetcher.next()
    assert _threads() == 1
    del prefetcher
    gc.collect()
    _wait_until(lambda: _threads() == 0)
