"""Connections between the ranks of a run, on which nothing counts but what a rank of it says.

Strangers can reach the port. They may send 200 bytes in 5 s, 64 of them at a time, and then are dropped. A message
proves with the run's secret (runtime/secret.py) which rank says it to which, in which run, and counts its messages: one
that was changed, or said before, is passed over. A rank connects once.
"""

import json
import selectors
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from megatron_ext.runtime.network import listen
from megatron_ext.runtime.secret import seal, unseal

_MOST_STRANGERS, _STRANGER_BYTES, _STRANGER_SECONDS = 64, 200, 5.0
_MESSAGE_BYTES = 1 << 20
"""Of a rank: more than a failure with its traceback takes."""

_PAUSE_SECONDS = 0.05
_GREETING = "greeting"

Message = dict[str, Any]


class Channel:
    """One end of a connection: lines of JSON."""

    def __init__(self, connection: socket.socket, secret: bytes, *, run: str, me: int, other: int | None) -> None:
        """``run`` differs for each use of the secret; ``other`` is None until the rank at the other end is known."""
        self.socket, self.other = connection, other
        self._secret, self._run, self._me = secret, run, me
        self._sent = self._taken = 0
        self._text = b""
        self._lock = threading.Lock()

    def greet(self) -> None:
        """Say which rank this is: the first message to one that does not know it yet."""
        self._send(_GREETING, {"rank": self._me})

    def send(self, **message: Any) -> None:
        """Send a message, if the connection still takes one."""
        self._send(f"{self._me} to {self.other}", message)

    def messages(self) -> list[Message]:
        """What has arrived of the other's messages; the first of them makes the other known.

        Raises:
            BlockingIOError, TimeoutError: nothing has arrived.
            OSError: the connection is gone.
            ValueError: it is used by a stranger, or a line has no end.
        """
        most = _STRANGER_BYTES if self.other is None else _MESSAGE_BYTES
        received = self.socket.recv(most)
        if not received:
            raise ConnectionResetError("closed")
        *lines, self._text = (self._text + received).split(b"\n")
        if max(map(len, (*lines, self._text))) > most:
            raise ValueError(f"a line of more than {most} bytes")
        return [message for line in lines for message in self._open(line)]

    def _open(self, line: bytes) -> list[Message]:
        try:
            context = _GREETING if self.other is None else f"{self.other} to {self._me}"
            message: Message = json.loads(unseal(self._secret, f"{self._run} {context}", line))
        except ValueError:
            if self.other is None:
                raise
            return []
        if self.other is None:
            self.other = int(message["rank"])
        if message["number"] <= self._taken:
            return []
        self._taken = message["number"]
        return [message]

    def _send(self, context: str, message: Message) -> None:
        with self._lock:
            self._sent += 1
            body = json.dumps({"number": self._sent, **message}).encode()
            with suppress(OSError):
                self.socket.sendall(seal(self._secret, f"{self._run} {context}", body) + b"\n")


class Reception:
    """Rank 0's port, and the channels of the ranks that have come to it."""

    def __init__(self, address: str, secret: bytes, *, run: str, world_size: int) -> None:
        """Listen at ``address``; OSError where that is not this host's."""
        self._secret, self._run = secret, run
        self._listener = listen(address)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._strangers: dict[Channel, float] = {}  # since when
        self._awaited = set(range(1, world_size))
        self.ranks: dict[int, Channel] = {}

    def hear(self, seconds: float) -> list[tuple[int, Message | None]]:
        """Messages with the ranks that sent them, after ``seconds`` at the latest; None: its connection is gone."""
        heard: list[tuple[int, Message | None]] = []
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                heard += self._accept()
            elif key.data in self._strangers or self.ranks.get(key.data.other) is key.data:
                heard += self._read(key.data)
        for stranger, since in list(self._strangers.items()):
            if time.monotonic() - since > _STRANGER_SECONDS:
                self._drop(stranger)
        return heard

    def send(self, **message: Any) -> None:
        """Send a message to all ranks that are here."""
        for channel in self.ranks.values():
            channel.send(**message)

    def close(self) -> None:
        """Let nobody in any more."""
        self._selector.unregister(self._listener)
        self._listener.close()

    def _accept(self) -> list[tuple[int, Message | None]]:
        if len(self._strangers) == _MOST_STRANGERS:
            self._drop(next(iter(self._strangers)))
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # It has gone again, or this process may open no more files at the moment.
            time.sleep(_PAUSE_SECONDS)
            for stranger in list(self._strangers):
                self._drop(stranger)
            return []
        connection.setblocking(False)
        channel = Channel(connection, self._secret, run=self._run, me=0, other=None)
        self._strangers[channel] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ, channel)
        # A rank has greeted by now: it is known before a crowd pushes it out.
        return self._read(channel)

    def _read(self, channel: Channel) -> list[tuple[int, Message | None]]:
        try:
            messages = channel.messages()
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            stranger = channel in self._strangers
            self._drop(channel)
            return [] if stranger or channel.other is None else [(channel.other, None)]
        if channel in self._strangers and channel.other is not None:
            if channel.other not in self._awaited:
                self._drop(channel)
                return []
            del self._strangers[channel]
            self._awaited.remove(channel.other)
            self.ranks[channel.other] = channel
        return [(channel.other, message) for message in messages if channel.other is not None]

    def _drop(self, channel: Channel) -> None:
        if self._strangers.pop(channel, None) is None and channel.other is not None:
            del self.ranks[channel.other]
        self._selector.unregister(channel.socket)
        channel.socket.close()
