"""Index arrays built in unusual ways: large ones by another process, and those for which the cache has no room."""

import errno
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.signals import stop_signals_blocked

T = TypeVar("T")

_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM})
"""Errors under which a run is better off without the cache than not at all; others mean that the path is wrong."""

_REMEDY = "set data.index_cache to a directory on a disk with room in which this user may write"


def call_apart(function: Callable[..., T], *arguments: Any, directory: Path) -> T:
    """Call by another process, which a signal to stop the run does not reach: the run stops when it is done.

    Raises:
        UserError: that process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with stop_signals_blocked():  # inherited by the new process
            called = pool.submit(function, *arguments)
        try:
            return called.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"index cache {directory}: the process that built an entry was killed; the usual cause is too little "
                "memory on this host"
            ) from error


def build_in_memory(
    build: Callable[[], dict[str, npt.NDArray[Any]]], *, directory: Path, error: OSError, large: bool
) -> dict[str, npt.NDArray[Any]]:
    """The arrays without the cache, into which writing has failed with ``error``.

    Raises:
        UserError: there can be no cache at that place, or building needs the disk too.
    """
    reason = error.strerror or str(error)
    if error.errno not in _PASSING:
        raise UserError(f"index cache {directory}: cannot be written ({reason}); {_REMEDY}") from error
    _warn(directory, reason)
    try:
        return call_apart(build, directory=directory) if large else build()
    except OSError as second:
        raise UserError(
            f"index cache {directory}: cannot be written ({reason}), nor can the index be built without it "
            f"({second.strerror or second}); {_REMEDY}"
        ) from second


@cache
def _warn(directory: Path, reason: str) -> None:
    """Say it once, not for each entry."""
    LOGGER.warning(
        "index cache %s: cannot be written (%s): this process builds the index in its memory, at every start; %s",
        *(directory, reason, _REMEDY),
    )
