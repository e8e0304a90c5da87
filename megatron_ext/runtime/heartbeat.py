"""Ranks notice when one of them is gone, and end together with one message.

A launcher sees a process end on its own host, and nothing else: not a process that hangs, not a host that is cut off;
and what the other ranks then say ("connection closed by peer") hides the cause. So every rank keeps a TCP connection
to rank 0, on which it gives a sign of life; whoever fails says so before it goes. Rank 0 decides which failure was the
first, prints it, and sends it to the others, which end at once. Where rank 0 itself is gone the others find out for
themselves. (A TCPStore has keys instead of connections: it does not say that a client is gone, and asks for no secret.)
What travels on the connections, and that strangers count for nothing there, is runtime/channel.py.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from megatron_ext.errors import UserError
from megatron_ext.runtime.channel import Channel, Message, Reception
from megatron_ext.runtime.failure import (
    Failure,
    failure_of,
    kill_if_here,
    lost,
    print_failure,
    silent,
    write_record,
)
from megatron_ext.runtime.rendezvous import Rendezvous

_BEATS = 5
"""Signs of life within the time after which a rank is given up."""

_GRACE_SECONDS = 1.0
"""How long rank 0 waits for the other ranks to find the same mistake in what the user gave."""

_FAREWELL_SECONDS = 2.0


class Heartbeat:
    """This rank's part: rank 0 monitors the others, which are linked to it."""

    def __init__(self, rendezvous: Rendezvous, *, seconds: float, run_dir: Path) -> None:
        assert rendezvous.sealed is not None, "one rank has nobody to hear"
        self._part: _Monitor | _Link
        self._rank = rendezvous.info.rank
        if rendezvous.info.is_main:
            # Signed with it, nothing that was said under the same secret before can be said again.
            run, secret, world_size = secrets.token_hex(8), rendezvous.sealed.secret, rendezvous.info.world_size
            reception = Reception(rendezvous.me.address, secret, run=run, world_size=world_size)
            rendezvous.sealed.set("heartbeat", json.dumps({"port": reception.port, "run": run}))
            self._part = _Monitor(rendezvous, seconds, run_dir, reception)
        else:
            where = json.loads(rendezvous.sealed.get("heartbeat"))
            connection = _connect(rendezvous, int(where["port"]), seconds)
            secret = rendezvous.sealed.secret
            channel = Channel(connection, secret, run=where["run"], me=self._rank, other=0)
            self._part = _Link(rendezvous, seconds, run_dir, channel)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _run(self) -> None:
        """The thread: its own end, too, is a failure that is told."""
        try:
            self._part.run()
        except BaseException as error:
            failure = failure_of(error, self._rank)
            self._part.end(replace(failure, kind="error", text=f"the heartbeat broke off: {failure.text}"))

    def fail(self, error: BaseException) -> NoReturn:
        """End this process and the run with it; the message is that of the first failure, wherever that is."""
        self._part.report(failure_of(error, self._rank))
        # The heartbeat's thread ends the process, with the status of the first failure.
        threading.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Say that this rank has done what it had to do."""
        self._part.close()


@contextmanager
def heartbeat(rendezvous: Rendezvous, *, seconds: float, run_dir: Path) -> Iterator[Heartbeat]:
    """Monitor the ranks while the body runs, and yield this rank's part.

    Args:
        rendezvous: the ranks, more than one.
        seconds: without a sign of life after which a rank is given up.
        run_dir: where a failure is recorded.
    """
    part = Heartbeat(rendezvous, seconds=seconds, run_dir=run_dir)
    yield part
    part.close()


def _connect(rendezvous: Rendezvous, port: int, seconds: float) -> socket.socket:
    address = (rendezvous.members[0].address, port)
    try:
        connection = socket.create_connection(address, timeout=seconds)
    except OSError as error:
        raise UserError(
            f"{rendezvous.me.title} cannot connect to rank 0 at {address[0]}:{port} ({error}); the hosts of a run "
            "need all ports between them, see also cluster.interface"
        ) from error
    connection.settimeout(seconds / _BEATS / 2)
    return connection


class _Monitor:
    """Rank 0's thread: hears all, decides once."""

    def __init__(self, rendezvous: Rendezvous, seconds: float, run_dir: Path, reception: Reception) -> None:
        self._rendezvous, self._seconds, self._run_dir, self._reception = rendezvous, seconds, run_dir, reception
        # When each rank that has come gave its last sign of life, and those that have said that they leave.
        self._heard: dict[int, float] = {}
        self._away: set[int] = set()
        # Failures that may not be the first: mistakes that all ranks may find, and echoes of another's failure.
        self._inputs: dict[int, Failure] = {}
        self._echoes: list[Failure] = []
        self._failing_since = 0.0
        self._reports: list[Failure] = []
        self._closing, self._closed = threading.Event(), threading.Event()

    def report(self, failure: Failure) -> None:
        """Take rank 0's own failure."""
        self._reports.append(failure)

    def close(self) -> None:
        """Tell the others that rank 0 leaves."""
        self._closing.set()
        self._closed.wait()

    def run(self) -> None:
        """Hear the others until rank 0 leaves, or the run ends."""
        interval = self._seconds / _BEATS
        started = checked = beat = time.monotonic()
        while not self._closing.is_set():
            self._hear(min(0.1, interval))
            now = time.monotonic()
            if now - checked > interval:
                # This process itself was held up; what the others sent meanwhile has just been heard.
                self._heard = {rank: max(heard, now - interval) for rank, heard in self._heard.items()}
            checked = now
            if now - beat > interval:
                beat = now
                self._reception.send(beat=0)
            self._find_silent(now, started)
            self._find_first(now)
        self._reception.send(bye=0)
        self._reception.close()
        self._closed.set()

    def _hear(self, seconds: float) -> None:
        for rank, message in self._reception.hear(seconds):
            # Who has said that it leaves has nothing more to say.
            if rank not in self._away:
                self._take(rank, message)
        for failure in self._reports:
            self._note(failure)
        self._reports.clear()

    def _take(self, rank: int, message: Message | None) -> None:
        if message is None:
            self._note(lost(self._rendezvous.members[rank]))
            return
        self._heard[rank] = time.monotonic()
        if "failure" in message or "bye" in message:
            self._away.add(rank)
        if "failure" in message:
            self._note(Failure(**message["failure"] | {"rank": rank}))

    def _note(self, failure: Failure) -> None:
        if failure.kind == "input":
            self._inputs[failure.rank] = failure
        elif failure.kind == "echo":
            self._echoes.append(failure)
        else:
            self.end(failure)
        self._failing_since = self._failing_since or time.monotonic()

    def _find_silent(self, now: float, started: float) -> None:
        """End the run where a rank gives no sign of life, or has never connected."""
        members = self._rendezvous.members
        for rank, heard in self._heard.items():
            if rank not in self._away and now - heard > self._seconds:
                self.end(silent(members[rank], self._seconds))
        if now - started > self._seconds + _GRACE_SECONDS and len(self._heard) < len(members) - 1:
            absent = min(set(range(1, len(members))) - set(self._heard))
            self.end(silent(members[absent], self._seconds))

    def _find_first(self, now: float) -> None:
        """End the run for a mistake in the input when all ranks have had time to find it; for an echo much later."""
        world_size, waited = len(self._rendezvous.members), now - self._failing_since
        if self._inputs and (len(self._inputs) == world_size or waited > _GRACE_SECONDS):
            same = len(self._inputs) == world_size and len({each.text for each in self._inputs.values()}) == 1
            self.end(next(iter(self._inputs.values())), everywhere=same)
        if self._echoes and not self._inputs and waited > self._seconds + _GRACE_SECONDS:
            self.end(self._echoes[0])

    def end(self, failure: Failure, *, everywhere: bool = False) -> NoReturn:
        """End the run, whatever happens on the way."""
        try:
            print_failure(failure, self._rendezvous, everywhere=everywhere)
            if failure.kind != "input":
                write_record(failure, self._rendezvous, self._run_dir, exclusive=False)
            self._reception.send(end=asdict(replace(failure, trace="")))
            kill_if_here(failure, self._rendezvous)
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while self._reception.ranks and time.monotonic() < deadline:
                self._reception.hear(0.02)
        finally:
            os._exit(failure.status)


class _Link:
    """Another rank's thread: gives signs of life to rank 0 and expects the same."""

    def __init__(self, rendezvous: Rendezvous, seconds: float, run_dir: Path, channel: Channel) -> None:
        self._rendezvous, self._seconds, self._run_dir, self._channel = rendezvous, seconds, run_dir, channel
        self._own: Failure | None = None
        self._main_left = False
        self._closing = threading.Event()
        channel.greet()

    def report(self, failure: Failure) -> None:
        """Send rank 0 this rank's failure."""
        self._own = failure
        if self._main_left:
            self._end_alone(failure)
        self._channel.send(failure=asdict(failure))

    def close(self) -> None:
        """Take leave of rank 0."""
        self._closing.set()
        self._channel.send(bye=0)

    def run(self) -> None:
        """Hear rank 0 until one of both leaves, or the run ends."""
        interval = self._seconds / _BEATS
        heard = beat = time.monotonic()
        while not self._closing.is_set():
            before = time.monotonic()
            gone, messages = False, []
            try:
                messages = self._channel.messages()
            except TimeoutError:
                pass
            except (OSError, ValueError):
                gone = True
            for message in messages:
                self._take(message)
            now = time.monotonic()
            if messages:
                heard = now
            elif now - before > interval:
                heard = max(heard, now - interval)  # this process itself was held up
            if self._main_left:
                return
            if gone and not self._closing.is_set():
                self._end_alone(lost(self._rendezvous.members[0]))
            if now - beat > interval / 2:
                beat = now
                self._channel.send(beat=0)
            if now - heard > self._seconds:
                self._end_alone(silent(self._rendezvous.members[0], self._seconds))

    def end(self, failure: Failure) -> NoReturn:
        """End this process, and the run through rank 0, which prints what for."""
        try:
            self._channel.send(failure=asdict(failure))
            time.sleep(_FAREWELL_SECONDS)
        finally:
            os._exit(failure.status)

    def _take(self, message: Message) -> None:
        if "end" in message:
            self._exit(Failure(**message["end"]))
        if "bye" in message:
            self._main_left = True
            if self._own is not None:
                self._end_alone(self._own)

    def _end_alone(self, failure: Failure) -> NoReturn:
        """Without rank 0 the first rank that can write the record prints the message."""
        try:
            if write_record(failure, self._rendezvous, self._run_dir, exclusive=True):
                print_failure(failure, self._rendezvous)
        finally:
            self._exit(failure)

    def _exit(self, failure: Failure) -> NoReturn:
        try:
            kill_if_here(failure, self._rendezvous)
        finally:
            os._exit(failure.status)
