"""Ranks notice when one of them is gone, and end together with one message.

A launcher sees a process end on its own host, and nothing else: not a process that hangs, not a host that is cut off;
and what the other ranks then say ("connection closed by peer") hides the cause. So every rank keeps a TCP connection
to rank 0, on which it gives a sign of life; whoever fails says so before it goes. Rank 0 decides which failure was the
first, prints it, and sends it to the others, which end at once. Where rank 0 itself is gone the others find out for
themselves. (A TCPStore has keys instead of connections: it does not say that a client is gone, and asks for no secret.)
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from megatron_ext.errors import UserError
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
        self._part: _Monitor | _Link
        self._rank = rendezvous.info.rank
        if rendezvous.info.is_main:
            key = secrets.token_hex(16)
            self._part = _Monitor(rendezvous, seconds, run_dir, key)
            rendezvous.store.set("heartbeat", json.dumps({"port": self._part.port, "key": key}))
        else:
            self._part = _Link(rendezvous, seconds, run_dir, **json.loads(rendezvous.store.get("heartbeat")))

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


def _send(to: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):
        to.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class _Peer:
    """What rank 0 knows of another rank's connection."""

    socket: socket.socket
    heard: float
    rank: int | None = None
    text: bytes = b""


class _Monitor:
    """Rank 0's thread: hears all, decides once."""

    def __init__(self, rendezvous: Rendezvous, seconds: float, run_dir: Path, key: str) -> None:
        self._rendezvous, self._seconds, self._run_dir, self._key = rendezvous, seconds, run_dir, key
        self._listener = socket.create_server(("", 0), backlog=rendezvous.info.world_size)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[_Peer] = []
        self._away: set[int] = set()
        self._present: set[int] = set()
        # Failures that may not be the first: mistakes that all ranks may find, and echoes of another's failure.
        self._inputs: dict[int, Failure] = {}
        self._echoes: list[Failure] = []
        self._failing_since = 0.0
        self._reports: list[Failure] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def report(self, failure: Failure) -> None:
        """Take rank 0's own failure."""
        self._reports.append(failure)

    def close(self) -> None:
        """Tell the others that rank 0 leaves."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        interval = self._seconds / _BEATS
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
                self._send_all({"beat": 0})
            self._find_silent(now, started)
            self._find_first(now)
        self._send_all({"bye": 0})
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
            self._note(failure)
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
                self._note(lost(self._rendezvous.members[peer.rank]))
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
        if "failure" in message or "bye" in message:
            self._away.add(peer.rank)
        if "failure" in message:
            self._note(Failure(**message["failure"]))

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.socket)
        peer.socket.close()
        self._peers.remove(peer)

    def _note(self, failure: Failure) -> None:
        if failure.kind == "input":
            self._inputs[failure.rank] = failure
        elif failure.kind == "echo":
            self._echoes.append(failure)
        else:
            self._end(failure)
        self._failing_since = self._failing_since or time.monotonic()

    def _find_silent(self, now: float, started: float) -> None:
        """End the run where a rank gives no sign of life, or has never connected."""
        members = self._rendezvous.members
        for peer in self._peers:
            if peer.rank is not None and peer.rank not in self._away and now - peer.heard > self._seconds:
                self._end(silent(members[peer.rank], self._seconds))
        if now - started > self._seconds + _GRACE_SECONDS and len(self._present) < len(members) - 1:
            absent = min(set(range(1, len(members))) - self._present)
            self._end(silent(members[absent], self._seconds))

    def _find_first(self, now: float) -> None:
        """End the run for a mistake in the input when all ranks have had time to find it; for an echo much later."""
        world_size, waited = len(self._rendezvous.members), now - self._failing_since
        if self._inputs and (len(self._inputs) == world_size or waited > _GRACE_SECONDS):
            same = len(self._inputs) == world_size and len({each.text for each in self._inputs.values()}) == 1
            self._end(next(iter(self._inputs.values())), everywhere=same)
        if self._echoes and not self._inputs and waited > self._seconds + _GRACE_SECONDS:
            self._end(self._echoes[0])

    def _end(self, failure: Failure, *, everywhere: bool = False) -> NoReturn:
        print_failure(failure, self._rendezvous, everywhere=everywhere)
        if failure.kind != "input":
            write_record(failure, self._rendezvous, self._run_dir, exclusive=False)
        self._send_all({"end": asdict(replace(failure, trace=""))})
        kill_if_here(failure, self._rendezvous)
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

    def _send_all(self, message: dict[str, Any]) -> None:
        for peer in self._peers:
            _send(peer.socket, message)


class _Link:
    """Another rank's thread: gives signs of life to rank 0 and expects the same."""

    def __init__(self, rendezvous: Rendezvous, seconds: float, run_dir: Path, *, port: int, key: str) -> None:
        self._rendezvous, self._seconds, self._run_dir = rendezvous, seconds, run_dir
        address = (rendezvous.info.master_address, port)
        try:
            self._socket = socket.create_connection(address, timeout=seconds)
        except OSError as error:
            raise UserError(
                f"{rendezvous.me.title} cannot connect to rank 0 at {address[0]}:{port} ({error}); the hosts of a run "
                "need all ports between them, see also cluster.interface"
            ) from error
        self._socket.settimeout(seconds / _BEATS / 2)
        self._text = b""
        self._own: Failure | None = None
        self._main_left = False
        self._closing = threading.Event()
        _send(self._socket, {"rank": rendezvous.info.rank, "key": key})
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def report(self, failure: Failure) -> None:
        """Send rank 0 this rank's failure."""
        self._own = failure
        if self._main_left:
            self._end_alone(failure)
        _send(self._socket, {"failure": asdict(failure)})

    def close(self) -> None:
        """Take leave of rank 0."""
        self._closing.set()
        _send(self._socket, {"bye": 0})

    def _run(self) -> None:
        interval = self._seconds / _BEATS
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
                _send(self._socket, {"beat": 0})
            if now - heard > self._seconds:
                self._end_alone(silent(self._rendezvous.members[0], self._seconds))

    def _take(self, received: bytes) -> None:
        *lines, self._text = (self._text + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "end" in message:
                self._exit(Failure(**message["end"]))
            if "bye" in message:
                self._main_left = True
                if self._own is not None:
                    self._end_alone(self._own)
        if not received and not self._main_left and not self._closing.is_set():
            self._end_alone(lost(self._rendezvous.members[0]))

    def _end_alone(self, failure: Failure) -> NoReturn:
        """Without rank 0 the first rank that can write the record prints the message."""
        if write_record(failure, self._rendezvous, self._run_dir, exclusive=True):
            print_failure(failure, self._rendezvous)
        self._exit(failure)

    def _exit(self, failure: Failure) -> NoReturn:
        kill_if_here(failure, self._rendezvous)
        os._exit(failure.status)
