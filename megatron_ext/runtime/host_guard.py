"""Stands beside deepspeed's launcher while a run is on several hosts, and ends the run as a whole.

``python -m megatron_ext.runtime.host_guard SPEC`` is started by the command with a pipe to it, and outlives it: where
the command ends in any way, the pipe does too, and the ranks are asked to save and stop. What the launcher lacks is
done here: signals reach the ranks, a host that ends or is cut off ends the others, a message that several ranks print
is printed once, and nothing of the job is left on any host.
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
from pathlib import Path
from typing import IO

import psutil

from megatron_ext.runtime.remote import ask_hosts

_POLL_SECONDS = 0.2
_SWEEP_SECONDS = 15.0
_ENDED_GRACE_SECONDS = 8.0
"""How long the other hosts may take to end by themselves after one of them has failed."""

_ASK_AGAIN_SECONDS = 3.0

_LAST_SECONDS = 20.0
"""How long the launcher may take to notice that everything it started is gone."""

_LAST_WORDS_SECONDS = 2.0

# The launcher's own log on each host, whose level cannot be set from here, and torch's of hosts without reverse names.
_NOISE = re.compile(r"\[launch\.py:\d+:|The hostname of the client socket cannot be retrieved")
_HOST_ENDED = re.compile(r"pdsh@[^:]*: (?P<host>[^:]+): ssh exited with exit code (?P<status>\d+)")
_NO_WAY = 255
_BY_SIGTERM = (256 - signal.SIGTERM, 128 + signal.SIGTERM)
_KEPT = (0, 2, os.EX_TEMPFAIL)


@dataclass(frozen=True)
class GuardSpec:
    """What is guarded."""

    job: str
    hosts: list[str]
    command: list[str]
    environment: dict[str, str]
    folders: list[str]
    """What the launch has written, and nobody needs when it is over."""

    silence_seconds: float
    """After which the ranks give up one that they do not hear from."""


class Guard:
    """The run as seen from where it was started."""

    def __init__(self, spec: GuardSpec) -> None:
        self._spec = spec
        self._ended: dict[str, int] = {}
        self._failed_at: float | None = None
        self._said: set[str] = set()
        self._stopping = False

    def run(self) -> int:
        """Start the launcher, see the run through, and return its exit status."""
        runner = subprocess.Popen(
            self._spec.command,
            env=self._spec.environment,
            cwd="/",  # which every host has, and which the launcher can name without quotes
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        pairs = ((runner.stdout, sys.stdout), (runner.stderr, sys.stderr))
        pumps = [threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in pairs]
        for pump in pumps:
            pump.start()
        wanted = swept = False
        asked_at = float("-inf")
        while (status := runner.poll()) is None:
            if wanted:
                time.sleep(_POLL_SECONDS)
            wanted = wanted or self._command_wants_to_stop()
            if wanted and time.monotonic() - asked_at > _ASK_AGAIN_SECONDS:
                # Again and again: a rank may have had no ears yet, or not have been there.
                self._stopping = True
                if self._sweep(signal.SIGTERM) > 0:
                    asked_at = time.monotonic()
            if not swept and self._others_took_too_long():
                self._sweep(signal.SIGKILL)
                swept, deadline = True, time.monotonic() + _LAST_SECONDS
            if swept and time.monotonic() > deadline:
                _kill_children(runner.pid)
        for pump in pumps:
            pump.join(_LAST_WORDS_SECONDS)
        if status in _BY_SIGTERM and wanted:
            # The ranks could not catch the signal yet: there is nothing that they could have saved.
            status = 0
        if status != 0:
            self._sweep(signal.SIGKILL)
            self._explain(status)
        return status if status in _KEPT else 1

    def _command_wants_to_stop(self) -> bool:
        """Whether the command said so, or is gone; waits for a moment."""
        readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        if readable:
            os.read(0, 4096)
        return bool(readable)

    def _others_took_too_long(self) -> bool:
        if self._failed_at is None:
            return False
        lost = self._ended and all(status == _NO_WAY for status in self._ended.values() if status)
        grace = self._spec.silence_seconds + _ENDED_GRACE_SECONDS / 2 if lost else _ENDED_GRACE_SECONDS
        return time.monotonic() - self._failed_at > grace

    def _sweep(self, number: int) -> int:
        answers = ask_hosts(
            self._spec.hosts, "megatron_ext.runtime.sweep", [self._spec.job, number], seconds=_SWEEP_SECONDS
        )
        return sum(int(answer.out) for answer in answers if answer.status == 0)

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
            unlabeled = line.partition(": ")[2] if line.partition(": ")[0] in self._spec.hosts else line
            if unlabeled.startswith("error: "):
                if unlabeled in self._said:
                    continue
                self._said.add(unlabeled)
            with suppress(OSError):  # nobody reads any more; the launcher must not wait for it
                to.write(unlabeled if unlabeled in self._said else line)
                to.flush()

    def _explain(self, status: int) -> None:
        """Name the first host that failed, where no rank has said what was wrong."""
        if self._said:
            return
        host, code = next(iter(self._ended.items()), ("", status))
        if code == _NO_WAY:
            message = f"the connection to host {host} was lost"
        elif host:
            message = f"host {host} ended first, with status {code}; its lines above say why"
        else:
            message = f"the launcher ended with status {status}"
        with suppress(OSError):
            sys.stderr.write(f"error: {message}\n")


def _kill_children(pid: int) -> None:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for part in (*process.children(recursive=True), process):
            with suppress(psutil.Error):
                part.kill()


if __name__ == "__main__":
    for harmless in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(harmless, signal.SIG_IGN)
    guarded = GuardSpec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        exit_status = Guard(guarded).run()
    finally:
        for folder in guarded.folders:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(exit_status)
