"""Runs a test function in real processes, one per rank, joined by a gloo group; and the same for one rank in place.

A rank is forked from a server that has torch, megatron-core and DeepSpeed loaded, so that starting one costs tens of
milliseconds. Nothing here can hang: the deadline kills every rank and shows what each had printed.
"""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist


class RankError(AssertionError):
    """A rank raised, died or ran past the deadline; the message holds its traceback and output."""


@dataclass(frozen=True)
class _Rank:
    index: int
    process: ForkServerProcess
    results: Connection
    log: Path

    def output(self) -> str:
        text = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        return f"\n--- output of rank {self.index} ---\n{text[-6000:]}" if text else ""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, init: bool = True
) -> list[Any]:
    """Results of ``fn(rank, world_size, *args)`` run in ``world_size`` processes, in the order of ranks.

    ``fn`` must be importable (defined at the top level of a test module); arguments and results are pickled by value.
    The environment holds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT and
    MEGATRON_EXT_SECRET as a launcher would set them. With ``init`` the default process group is there before ``fn``
    runs and destroyed after.
    Raises RankError with the traceback of the first rank to fail, after killing the others, or when ``timeout``
    seconds have passed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, contextlib.ExitStack() as stack:
        port = _free_port()
        ranks = []
        for index in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            log = Path(folder) / f"rank{index}.txt"
            setting = _Setting(index, world_size, port, folder, timeout, init)
            process = context.Process(target=_rank_main, args=(setting, sender, fn, args), daemon=True)
            process.start()
            sender.close()
            stack.callback(_end, process)
            ranks.append(_Rank(index, process, receiver, log))
        return _collect(ranks, deadline, timeout)


@contextlib.contextmanager
def single_rank() -> Iterator[None]:
    """A gloo group of one rank in this process, with megatron-core's groups destroyed after it."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            _destroy_groups()


@dataclass(frozen=True)
class _Setting:
    rank: int
    world_size: int
    port: int
    folder: str
    timeout: float
    init: bool


def _collect(ranks: list[_Rank], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {rank.results: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank.index for rank in waiting.values()]
            logs = "".join(rank.output() for rank in ranks)
            raise RankError(f"ranks {late} of {len(ranks)} did not finish in {timeout:.0f} s{logs}")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                rank.process.join(5)
                message = f"rank {rank.index} died with exit status {rank.process.exitcode}{rank.output()}"
                raise RankError(message) from None
            if not succeeded:
                raise RankError(f"rank {rank.index} failed:\n{value}{rank.output()}")
            results[rank.index] = value
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
    return [results[rank.index] for rank in ranks]


def _rank_main(setting: _Setting, sender: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _redirect_output(Path(setting.folder) / f"rank{setting.rank}.txt")
    # On a hang the parent's message then shows where each rank stood.
    faulthandler.dump_traceback_later(0.9 * setting.timeout, file=sys.stderr)
    rank, world_size = setting.rank, setting.world_size
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size), MASTER_PORT=str(setting.port))
    os.environ.update(MEGATRON_EXT_SECRET="known to these ranks alone")
    try:
        if setting.init:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{setting.folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=setting.timeout),
            )
        payload = pickle.dumps((True, fn(rank, world_size, *args)))
        if setting.init:
            # A rank that leaves early would break the others' connections.
            dist.barrier()
            _destroy_groups()
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(payload)
    sender.close()


def _destroy_groups() -> None:
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _end(process: ForkServerProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
