"""Ranks notice when one of them is gone, and end together with one message.

A launcher sees a process end on its own host, and nothing else: not a process that hangs, not a host that is cut off;
and what the other ranks then say ("connection closed by peer") hides the cause. So every rank keeps a TCP connection
to rank 0, on which it gives a sign of life; whoever fails says so before it goes. Rank 0 decides on the first cause,
says it, and tells the others, which end at once. Where rank 0 itself is gone the others find out for themselves.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.errors import UserError
from megatron_ext.runtime.failure import (
    RECORD,
    Failure,
    kill_if_here,
    lost,
    say,
    silent,
    suppress_full_disk,
    write_record,
)
from megatron_ext.runtime.meeting import Meeting

_BEATS = 5
"""Signs of life within the time after which a rank is given up."""

_SETTLE_SECONDS = 1.0
"""How long rank 0 waits for the other ranks to find the same mistake in what the user gave."""

_FAREWELL_SECONDS = 2.0


@dataclass(frozen=True)
class WatchOptions:
    """What the watch needs to know."""

    seconds: float
    """Silence after which a rank is given up."""

    run_dir: Path
    """Where a failure is recorded."""


class Watch:
    """This rank's part in the watch."""

    def __init__(self, meeting: Meeting, options: WatchOptions) -> None:
        self._meeting = meeting
        center = None
        if meeting.info.is_main:
            key = secrets.token_hex(16)
            center = _Center(meeting, options, key)
            meeting.store.set("watch", json.dumps({"port": center.port, "key": key}))
        place = json.loads(meeting.store.get("watch"))
        self._center = center
        self._line = None if center else _Line(meeting, options, int(place["port"]), place["key"])

    def leave_with(self, failure: Failure) -> NoReturn:
        """End this process and the run with it; the message is that of the first cause, wherever that is."""
        part = self._center or self._line
        assert part is not None
        part.report(failure)
        # The watching thread ends the process, with the status of the first cause.
        threading.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Leave the watch: this rank has done what it had to do."""
        part = self._center or self._line
        assert part is not None
        part.close()


@contextmanager
def watch(meeting: Meeting, options: WatchOptions) -> Iterator[Watch | None]:
    """Watch the other ranks while the body runs, and be watched; None for a run of one rank, or where it is off."""
    if meeting.info.is_main:
        with suppress_full_disk():
            (options.run_dir / RECORD).unlink(missing_ok=True)
    if meeting.info.world_size == 1 or not options.seconds:
        yield None
        return
    watching = Watch(meeting, options)
    yield watching
    watching.close()


@dataclass
class _Peer:
    """What rank 0 knows of another rank's connection."""

    socket: socket.socket
    heard: float
    rank: int | None = None
    text: bytes = b""


@dataclass
class _Findings:
    """Failures that rank 0 has heard of and not yet decided on."""

    inputs: dict[int, Failure] = field(default_factory=dict)
    echoes: list[Failure] = field(default_factory=list)
    since: float = 0.0


class _Center:
    """Rank 0's thread: hears all, decides once."""

    def __init__(self, meeting: Meeting, options: WatchOptions, key: str) -> None:
        self._meeting, self._options, self._key = meeting, options, key
        self._listener = socket.create_server(("", 0), backlog=meeting.info.world_size)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[_Peer] = []
        self._away: set[int] = set()
        self._present: set[int] = set()
        self._findings = _Findings()
        self._reports: list[Failure] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def report(self, failure: Failure) -> None:
        """Take rank 0's own failure."""
        self._reports.append(failure)

    def close(self) -> None:
        """Tell the others that rank 0 leaves."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        interval = self._options.seconds / _BEATS
        started = checked = beat = time.monotonic()
        while not self._closing.is_set():
            self._hear(min(0.1, interval))
            now = time.monotonic()
            if now - checked > interval:
                # This process itself was held up; what the others sent meanwhile has just been heard.
                for peer in self._peers:
                    peer.heard = max(peer.heard, now - interval)
            checked = now
            if now - beat > interval:
                beat = now
                self._tell({"beat": 0})
            self._judge(now, started)
        self._tell({"bye": 0})
        self._listener.close()

    def _hear(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                peer = _Peer(connection, time.monotonic())
                self._peers.append(peer)
                self._selector.register(connection, selectors.EVENT_READ, peer)
            else:
                self._read(key.data)
        for failure in self._reports:
            self._consider(failure)
        self._reports.clear()

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        peer.heard = time.monotonic()
        if not received:
            self._drop(peer)
            if peer.rank is not None and peer.rank not in self._away:
                self._consider(lost(self._meeting.members[peer.rank]))
            return
        *lines, peer.text = (peer.text + received).split(b"\n")
        for line in lines:
            self._take(peer, json.loads(line))

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.rank is None:
            if message.get("key") != self._key:
                self._drop(peer)
                return
            peer.rank = int(message["rank"])
            self._present.add(peer.rank)
        if "failure" in message:
            self._away.add(peer.rank)
            self._consider(Failure(**message["failure"]))
        if "bye" in message:
            self._away.add(peer.rank)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.socket)
        peer.socket.close()
        self._peers.remove(peer)

    def _consider(self, failure: Failure) -> None:
        if failure.kind == "input":
            self._findings.inputs[failure.rank] = failure
        elif failure.kind == "echo":
            self._findings.echoes.append(failure)
        else:
            self._end(failure)
        self._findings.since = self._findings.since or time.monotonic()

    def _judge(self, now: float, started: float) -> None:
        members, seconds = self._meeting.members, self._options.seconds
        for peer in self._peers:
            if peer.rank is not None and peer.rank not in self._away and now - peer.heard > seconds:
                self._end(silent(members[peer.rank], seconds))
        if now - started > seconds + _SETTLE_SECONDS and len(self._present) < len(members) - 1:
            absent = min(set(range(1, len(members))) - self._present)
            self._end(silent(members[absent], seconds))
        inputs, waited = self._findings.inputs, now - self._findings.since
        if inputs and (len(inputs) == len(members) or waited > _SETTLE_SECONDS):
            first = next(iter(inputs.values()))
            same = len(inputs) == len(members) and len({failure.text for failure in inputs.values()}) == 1
            self._end(first, everywhere=same)
        if self._findings.echoes and not inputs and waited > seconds + _SETTLE_SECONDS:
            self._end(self._findings.echoes[0])

    def _end(self, failure: Failure, *, everywhere: bool = False) -> NoReturn:
        say(failure, self._meeting, everywhere=everywhere)
        if failure.kind != "input":
            write_record(failure, self._meeting, self._options.run_dir, exclusive=False)
        self._tell({"verdict": asdict(replace(failure, trace=""))})
        kill_if_here(failure, self._meeting)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while (left := [peer for peer in self._peers if peer.rank is not None]) and time.monotonic() < deadline:
            for peer in left:
                with suppress(BlockingIOError):
                    try:
                        gone = not peer.socket.recv(65536)
                    except ConnectionError:
                        gone = True
                    if gone:
                        self._peers.remove(peer)
            time.sleep(0.02)
        os._exit(failure.status)

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers:
            with suppress(OSError):
                peer.socket.sendall(json.dumps(message).encode() + b"\n")


class _Line:
    """Another rank's thread: gives signs of life to rank 0 and expects the same."""

    def __init__(self, meeting: Meeting, options: WatchOptions, port: int, key: str) -> None:
        self._meeting, self._options = meeting, options
        place = (meeting.info.master_address, port)
        try:
            self._socket = socket.create_connection(place, timeout=options.seconds)
        except OSError as error:
            raise UserError(
                f"{meeting.me.title} cannot connect to rank 0 at {place[0]}:{port} ({error}); the hosts of a run need "
                "all ports between them, see also cluster.interface"
            ) from error
        self._socket.settimeout(options.seconds / _BEATS / 2)
        self._text = b""
        self._own: Failure | None = None
        self._main_left = False
        self._closing = threading.Event()
        self._send({"rank": meeting.info.rank, "key": key})
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def report(self, failure: Failure) -> None:
        """Tell rank 0 of this rank's failure."""
        self._own = failure
        if self._main_left:
            self._end(failure, said=False)
        self._send({"failure": asdict(failure)})

    def close(self) -> None:
        """Take leave of rank 0."""
        self._closing.set()
        self._send({"bye": 0})

    def _run(self) -> None:
        interval = self._options.seconds / _BEATS
        heard = beat = time.monotonic()
        while not self._closing.is_set():
            before = time.monotonic()
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                received = None
            except OSError:
                received = b""
            now = time.monotonic()
            if received is not None:
                heard = now
                self._take(received)
            elif now - before > interval:
                heard = max(heard, now - interval)  # this process itself was held up
            if self._main_left:
                return
            if now - beat > interval / 2:
                beat = now
                self._send({"beat": 0})
            if now - heard > self._options.seconds:
                self._end(silent(self._meeting.members[0], self._options.seconds), said=False)

    def _take(self, received: bytes) -> None:
        *lines, self._text = (self._text + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "verdict" in message:
                self._end(Failure(**message["verdict"]), said=True)
            if "bye" in message:
                self._main_left = True
                if self._own is not None:
                    self._end(self._own, said=False)
        if not received and not self._main_left and not self._closing.is_set():
            self._end(lost(self._meeting.members[0]), said=False)

    def _end(self, failure: Failure, *, said: bool) -> NoReturn:
        if not said and write_record(failure, self._meeting, self._options.run_dir, exclusive=True):
            say(failure, self._meeting)
        kill_if_here(failure, self._meeting)
        os._exit(failure.status)

    def _send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")
