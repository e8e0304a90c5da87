"""What ended a run: said once, by one rank, with its right exit status."""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from megatron_ext.errors import RunStopped, UserError
from megatron_ext.runtime.log import LOGGER, file_only
from megatron_ext.runtime.rendezvous import Member, Rendezvous
from megatron_ext.runtime.run_lock import FAILURE_RECORD

# How gloo and NCCL say that another rank is gone.
_OF_OTHERS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
_MAX_TRACE = 30_000
"""Characters of a traceback or a message that travel to rank 0: what a socket takes without waiting."""


@dataclass(frozen=True)
class Failure:
    """Why a run has to end."""

    rank: int
    text: str
    status: int
    kind: Literal["input", "error", "echo", "lost", "silent"]
    """input: one message, no traceback. error: any other exception. echo: an exception that tells that another rank is
    gone, so that the cause is elsewhere. lost: the process has ended without a word. silent: no sign of life."""

    trace: str = ""
    """Traceback, of an error or an echo."""

    def __post_init__(self) -> None:
        if self.status not in (1, 2):
            raise ValueError(f"a failure has the exit status 1 or 2, not {self.status!r}")


def failure_of(error: BaseException, rank: int) -> Failure:
    """Describe an exception of a rank."""
    if isinstance(error, UserError):
        return Failure(rank, str(error)[:_MAX_TRACE], 2, "input")
    if isinstance(error, RunStopped):
        return Failure(rank, str(error), 1, "input")  # all ranks come to it
    if isinstance(error, SystemExit):
        return Failure(rank, "ended because of another rank", 2 if error.code == 2 else 1, "echo")
    trace = "".join(traceback.format_exception(error))[-_MAX_TRACE:]
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":")[:_MAX_TRACE]
    return Failure(rank, text, 1, "echo" if _is_echo(error) else "error", trace)


def lost(member: Member) -> Failure:
    """The failure of a rank whose process has ended without a word."""
    return Failure(member.rank, "ended without a word: killed, or out of memory; see the host's kernel log", 1, "lost")


def silent(member: Member, seconds: float) -> Failure:
    """The failure of a rank that nobody hears from."""
    text = (
        f"has given no sign of life for {seconds:.0f} s: the process hangs or was stopped, or its host is down or cut "
        "off the network (cluster.heartbeat_seconds)"
    )
    return Failure(member.rank, text, 1, "silent")


def print_failure(failure: Failure, rendezvous: Rendezvous, *, everywhere: bool = False) -> None:
    """Print what ended the run, and put it into the log.

    Args:
        failure: the first cause.
        rendezvous: gives the rank its host.
        everywhere: all ranks said the same, so that no rank is named.
    """
    title = rendezvous.members[failure.rank].title
    separator = " " if failure.kind in ("lost", "silent") else ": "
    text = failure.text if everywhere else f"{title}{separator}{failure.text}"
    with suppress(OSError, ValueError):  # nobody reads any more
        if failure.trace:
            print(failure.trace, file=sys.stderr, flush=True)  # noqa: T201 - a bug keeps its traceback
        print(f"error: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the one message
    file_only(LOGGER).error(text)


def write_record(failure: Failure, rendezvous: Rendezvous, run_dir: Path, *, exclusive: bool) -> bool:
    """Write the run directory's record of a failure; with ``exclusive`` False where another rank has done so."""
    content = asdict(failure) | {"host": rendezvous.members[failure.rank].host, "time": time.time()}
    with suppress(OSError):  # a full disk is no further failure
        with (run_dir / FAILURE_RECORD).open("x" if exclusive else "w") as file:
            json.dump(content, file)
        return True
    return not (exclusive and (run_dir / FAILURE_RECORD).exists())


def kill_if_here(failure: Failure, rendezvous: Rendezvous) -> None:
    """Kill a silent rank of this machine: it does not react to anything less, and its launcher waits for it."""
    member = rendezvous.members[failure.rank]
    if failure.kind == "silent" and member.machine == rendezvous.me.machine and member != rendezvous.me:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(member.pid, signal.SIGKILL)


def _is_echo(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OF_OTHERS)
