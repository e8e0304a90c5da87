"""Executors for the kernels on the CPU: what torch's thread pool is to them in the program (csrc/common/abi.h)."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Body = Callable[[int, int, int | None], None]
BODY: Any = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
EXECUTOR: Any = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p)
THREADS = 4


def _serial(begin: int, end: int, _grain: int, body: Body, context: int | None) -> None:
    if begin < end:
        body(begin, end, context)


def _threaded(begin: int, end: int, grain: int, body: Body, context: int | None) -> None:
    """Pieces as small as they may be, the last ones first, several at a time (ctypes lets go of the interpreter)."""
    starts = range(begin, end, max(grain, 1))
    with ThreadPoolExecutor(THREADS) as pool:
        done = [pool.submit(body, start, min(start + max(grain, 1), end), context) for start in reversed(starts)]
        for each in done:
            each.result()


SERIAL = EXECUTOR(_serial)
THREADED = EXECUTOR(_threaded)
