"""Starts the ranks through the deepspeed launcher, passes signals on to them, and waits.

The launcher's own handling of a signal does not suit a training run: its outer process dies on SIGTERM and leaves the
ranks behind, its inner one kills them after 30 seconds. So the launcher gets a session of its own, where a terminal's
Ctrl-C does not reach it, and signals go straight to the ranks, which finish their step, save and exit with status 0.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import SUPERVISOR
from megatron_ext.runtime.signals import StopRequest

_WORKER = "megatron_ext.worker"
_POLL_SECONDS = 0.2
_ENDED_BY_SIGTERM = 256 - signal.SIGTERM
"""Exit status of the launcher after a rank that SIGTERM ended: it exits with the negative number of the signal."""
_BY_A_SIGNAL = 128
"""Exit statuses from here on are those of programs that a signal ended, as shells and the launcher tell them."""


@dataclass(frozen=True)
class LaunchOptions:
    """How many ranks to start on this machine, and where they meet."""

    ranks: int
    on_cpu: bool
    """Whether the ranks compute on the CPU: DeepSpeed is told so, and they share the cores."""

    master_port: int | None = None
    """Port of the rendezvous; None takes a free one."""


def launch(options: LaunchOptions, worker_arguments: Sequence[str], *, stop: StopRequest | None = None) -> int:
    """Run the training worker on ``options.ranks`` local ranks and return its exit status.

    Args:
        options: where the ranks run.
        worker_arguments: what each rank is started with.
        stop: is told of the signals that arrive meanwhile, for a caller that has something to do after this run.

    Raises:
        UserError: the launcher is not installed, or the port is taken.
    """
    ranks = start_ranks(options, worker_arguments)
    received = StopRequest() if stop is None else stop

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.receive(number)
        ranks.ask_to_stop()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    reached = False
    try:
        while (status := ranks.poll()) is None:
            if received.requested and not reached:
                # The first signal may have come before there was a rank to take it.
                reached = ranks.ask_to_stop()
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        ranks.close()
    return status


class Ranks:
    """A run's ranks on this machine, for a caller that has to watch them; otherwise ``launch`` waits."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._asked = False

    def poll(self) -> int | None:
        """Exit status of the run (1 where a signal ended a rank or the launcher), or None while it goes on.

        0 also where the ranks were asked to stop while they could not catch the signal yet, or not any more: before
        their first step, or after their last checkpoint.
        """
        status = self._process.poll()
        if self._asked and status == _ENDED_BY_SIGTERM:
            return 0
        return status if status is None or 0 <= status < _BY_A_SIGNAL else 1

    def ask_to_stop(self) -> bool:
        """Ask every rank to finish its step, save and exit; whether there was a rank to ask."""
        reached = _signal_ranks(self._process.pid, signal.SIGTERM)
        self._asked = self._asked or reached
        return reached

    def close(self) -> None:
        """Kill whatever is left."""
        _kill_session(self._process.pid)
        self._process.wait()


def start_ranks(options: LaunchOptions, worker_arguments: Sequence[str], *, output: Path | None = None) -> Ranks:
    """Start the training worker on ``options.ranks`` local ranks; ``close`` what is returned.

    Args:
        options: where the ranks run.
        worker_arguments: what each rank is started with.
        output: file to which everything that they print is appended; None: where this process prints.

    Raises:
        UserError: the launcher is not installed, or the port is taken.
    """
    command, environment = launch_command(options, worker_arguments), _environment(options)
    if output is None:
        return Ranks(subprocess.Popen(command, env=environment, start_new_session=True))
    with output.open("ab") as file:
        return Ranks(
            subprocess.Popen(command, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT)
        )


def launch_command(options: LaunchOptions, worker_arguments: Sequence[str]) -> list[str]:
    """Return the deepspeed command line that starts the worker.

    Raises:
        UserError: the launcher is not installed, or the port is taken.
    """
    port = free_port() if options.master_port is None else _checked_port(options.master_port)
    return [
        *(sys.executable, str(deepspeed_program())),
        *("--num_gpus", str(options.ranks), "--master_port", str(port), "--log_level", "critical", "--no_local_rank"),
        *("--module", _WORKER, *worker_arguments),
    ]


def free_port() -> int:
    """Return a TCP port that no program listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _checked_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--master-port {port} cannot be used ({error}); choose another, or leave it out for a free one"
            ) from error
    return port


def deepspeed_program() -> Path:
    """Path of the deepspeed launcher.

    Raises:
        UserError: it is not installed.
    """
    beside_python = Path(sys.executable).parent / "deepspeed"
    found = beside_python if beside_python.is_file() else shutil.which("deepspeed")
    if found is None:
        raise UserError("the deepspeed launcher is not installed beside this Python; pip install deepspeed")
    return Path(found)


def _environment(options: LaunchOptions) -> dict[str, str]:
    # A killed command cannot pass its own end on; the ranks look for it.
    environment = os.environ | {SUPERVISOR: str(os.getpid())}
    if options.on_cpu:
        environment["DS_ACCELERATOR"] = "cpu"
        # Without this every rank starts a thread per core, and the ranks fight for the cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // options.ranks)))
    return environment


def _signal_ranks(launcher_pid: int, number: int) -> bool:
    """Send the signal to all ranks; whether there was one."""
    reached = False
    with suppress(psutil.Error):
        for child in psutil.Process(launcher_pid).children(recursive=True):
            with suppress(psutil.Error):
                if _is_rank(child):
                    child.send_signal(number)
                    reached = True
    return reached


def _is_rank(process: psutil.Process) -> bool:
    # The launcher's own two processes carry the worker's name in their arguments too.
    command = process.cmdline()
    return _WORKER in command and not any("deepspeed" in part for part in command[: command.index(_WORKER)])


def _kill_session(session: int) -> None:
    """Leave nothing behind: whatever the launcher started is in its session."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
