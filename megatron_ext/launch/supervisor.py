"""Stands between the command and deepspeed's launcher while a run goes on, and ends the run as a whole.

``python -m megatron_ext.launch.supervisor`` is started by the command, reads what to do (``Orders``, one line of JSON)
from the pipe to it, and outlives the command: where that ends in any way, the pipe does too, and the ranks are asked to
save and stop. What deepspeed's launcher lacks is done here: signals reach the ranks, a host that ends or is cut off
ends the others, a message that several ranks print is printed once, and nothing of the job is left on any host.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import psutil

from megatron_ext.launch.hosts import NO_WAY, signal_job_on

_POLL_SECONDS = 0.2
# How long the other hosts may take to end by themselves after one of them has failed.
_ENDED_GRACE_SECONDS = 8.0
_ASK_AGAIN_SECONDS = 3.0

_LAST_SECONDS = 20.0  # how long the launcher may take to notice that everything it started is gone
_LAST_WORDS_SECONDS = 2.0

# The launcher's own log on each host, whose level cannot be set from here, and torch's of hosts without reverse names.
_NOISE = re.compile(r"\[launch\.py:\d+:|The hostname of the client socket cannot be retrieved")
_HOST_ENDED = re.compile(r"pdsh@[^:]*: (?P<host>[^:]+): ssh exited with exit code (?P<status>\d+)")
# Exit statuses after a rank that SIGTERM ended: deepspeed's launcher exits with the negative number of the signal.
_BY_SIGTERM = (256 - signal.SIGTERM, 128 + signal.SIGTERM)
_KEPT = (0, 2, os.EX_TEMPFAIL)  # exit statuses of the worker that say more than that it failed


@dataclass(frozen=True)
class Orders:
    """What to start, and where it will run."""

    job: str
    # Names that ssh knows; none: the ranks run on this machine, and print where this process does.
    hosts: list[str]
    command: list[str]
    folder: str  # what the launch has written, and nobody needs when it is over
    silence_seconds: float  # after which the ranks give up one that they do not hear from


class Supervisor:
    """The run as seen from where it was started."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._ended: dict[str, int] = {}
        self._failed_at: float | None = None
        self._said: set[str] = set()
        self._stopping = False

    def run(self) -> int:
        """Start the launcher, see the run through, and return its exit status."""
        runner = self._start()
        pumps = [threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in _streams(runner)]
        for pump in pumps:
            pump.start()
        wanted = killed = False
        asked_at = float("-inf")
        while (status := runner.poll()) is None:
            if wanted:
                time.sleep(_POLL_SECONDS)
            wanted = wanted or _command_wants_to_stop()
            if wanted and time.monotonic() - asked_at > _ASK_AGAIN_SECONDS:
                # Again and again: a rank may not have caught signals yet, or not have been there.
                self._stopping = True
                if self._signal(signal.SIGTERM) > 0:
                    asked_at = time.monotonic()
            if not killed and self._others_took_too_long():
                self._signal(signal.SIGKILL)
                killed, deadline = True, time.monotonic() + _LAST_SECONDS
            if killed and time.monotonic() > deadline:
                _kill_tree(runner.pid)
        for pump in pumps:
            pump.join(_LAST_WORDS_SECONDS)
        if status in _BY_SIGTERM and self._stopping:
            # The ranks could not catch the signal yet, or not any more: there is nothing left to save.
            status = 0
        if status != 0:
            self._signal(signal.SIGKILL)
            self._explain(status)
        return status if status in _KEPT else 1

    def _start(self) -> "subprocess.Popen[str]":
        if not self._orders.hosts:
            return subprocess.Popen(self._orders.command, stdin=subprocess.DEVNULL, text=True)
        return subprocess.Popen(
            self._orders.command,
            cwd="/",  # which every host has, and which the launcher can name without quotes
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def _signal(self, number: int) -> int:
        return signal_job_on(self._orders.hosts, self._orders.job, number)

    def _others_took_too_long(self) -> bool:
        if self._failed_at is None:
            return False
        lost = self._ended and all(status == NO_WAY for status in self._ended.values() if status)
        grace = self._orders.silence_seconds + _ENDED_GRACE_SECONDS / 2 if lost else _ENDED_GRACE_SECONDS
        return time.monotonic() - self._failed_at > grace

    def _pass_on(self, lines: IO[str], to: IO[str]) -> None:
        for line in lines:
            if _NOISE.search(line):
                continue
            if match := _HOST_ENDED.match(line):
                status = int(match["status"])
                if not (self._stopping and status in _BY_SIGTERM):
                    self._ended[match["host"]] = status
                    self._failed_at = self._failed_at or time.monotonic()
                continue
            unlabeled = line.partition(": ")[2] if line.partition(": ")[0] in self._orders.hosts else line
            if unlabeled.startswith("error: "):
                if unlabeled in self._said:
                    continue
                self._said.add(unlabeled)
            with suppress(OSError):  # nobody reads any more; the launcher must not wait for it
                to.write(unlabeled if unlabeled in self._said else line)
                to.flush()

    def _explain(self, status: int) -> None:
        """Name the first host that failed, where no rank has said what was wrong."""
        if self._said or not self._orders.hosts:
            return
        host, code = next(iter(self._ended.items()), ("", status))
        if code == NO_WAY:
            message = f"the connection to host {host} was lost"
        elif host:
            message = f"host {host} ended first, with status {code}; its lines above say why"
        else:
            message = f"the launcher ended with status {status}"
        with suppress(OSError):
            sys.stderr.write(f"error: {message}\n")


def _streams(runner: "subprocess.Popen[str]") -> list[tuple[IO[str], IO[str]]]:
    """What the launcher prints, and where that goes; none where it prints there itself."""
    pairs = ((runner.stdout, sys.stdout), (runner.stderr, sys.stderr))
    return [(source, to) for source, to in pairs if source is not None]


def _command_wants_to_stop() -> bool:
    """Whether the command said so, or is gone; waits for a moment."""
    readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
    if readable:
        os.read(0, 4096)
    return bool(readable)


def _kill_tree(pid: int) -> None:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for part in (*process.children(recursive=True), process):
            with suppress(psutil.Error):
                part.kill()


def _as_program() -> int:
    for harmless in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler, which the programs started here do not inherit, as they would SIG_IGN.
        signal.signal(harmless, lambda *_: None)
    with open(0, "rb", buffering=0, closefd=False) as pipe:  # what follows the line stays in the pipe
        orders = Orders(**json.loads(pipe.readline()))
    try:
        return Supervisor(orders).run()
    finally:
        shutil.rmtree(orders.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(_as_program())
