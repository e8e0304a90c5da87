"""What ranks say to each other, against what strangers say: real sockets on this machine."""

import socket
import time
from collections.abc import Iterator

import pytest

from megatron_ext.runtime import channel as module
from megatron_ext.runtime.channel import Channel, Message, Reception

SECRET, RUN = b"known to the ranks alone", "this run"


class Recorder:
    """Stands in the place of a socket and keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.sent.append(data)


def said(rank: int, *messages: Message, secret: bytes = SECRET, run: str = RUN, to: int = 0) -> list[bytes]:
    """The greeting of a rank and its messages, as they travel."""
    recorder = Recorder()
    channel = Channel(recorder, secret, run=run, me=rank, other=to)  # type: ignore[arg-type]
    channel.greet()
    for message in messages:
        channel.send(**message)
    return recorder.sent


@pytest.fixture
def reception() -> Iterator[Reception]:
    made = Reception("127.0.0.1", SECRET, run=RUN, world_size=3)
    yield made
    made.close()


class Caller:
    """A connection to the reception."""

    def __init__(self, reception: Reception, *lines: bytes) -> None:
        self.reception = reception
        self.socket = socket.create_connection(("127.0.0.1", reception.port))
        self.heard = self.say(*lines)

    def say(self, *lines: bytes) -> list[tuple[int, Message | None]]:
        """Send bytes, and what the reception makes of them."""
        self.socket.sendall(b"".join(lines))
        return hear(self.reception)

    def cut(self) -> bool:
        """Whether the other end has closed the connection."""
        self.socket.settimeout(0.2)
        try:
            return self.socket.recv(1) == b""
        except TimeoutError:
            return False
        except ConnectionError:
            return True


def hear(reception: Reception) -> list[tuple[int, Message | None]]:
    """All that is there to be heard, without the numbers."""
    heard, quiet = [], 0
    while quiet < 2:
        new = reception.hear(0.05)
        heard += new
        quiet = 0 if new else quiet + 1
    return [(rank, message and {key: message[key] for key in message if key != "number"}) for rank, message in heard]


def test_a_rank_is_heard_and_answered(reception: Reception) -> None:
    rank = Caller(reception, *said(1, {"beat": 0}, {"failure": {"text": "it's \u00e9"}}))
    assert rank.heard == [(1, {"rank": 1}), (1, {"beat": 0}), (1, {"failure": {"text": "it's \u00e9"}})]
    reception.send(end={"status": 1})
    channel = Channel(rank.socket, SECRET, run=RUN, me=1, other=0)
    assert channel.messages() == [{"number": 1, "end": {"status": 1}}]
    rank.socket.close()
    assert hear(reception) == [(1, None)]


STRANGERS = {
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "a list": b"[]\n",
    "an object": b"{}\n",
    "deep": b"[" * 199 + b"\n",
    "binary": bytes(range(200)) + b"\n",
    "lines": b"\n" * 200,
    "no line": b"x" * 201,
    "another secret": b"".join(said(1, {"failure": {}}, secret=b"guessed at, not known")),
    "no secret": b"".join(said(1, {"failure": {}}, secret=b"")),
    "another run": b"".join(said(1, {"failure": {}}, run="the run before")),
    "no such rank": b"".join(said(3, {"failure": {}})),
    "rank 0": b"".join(said(0, {"failure": {}})),
    "no greeting": b"".join(said(1, {"failure": {}})[1:]),
    "cut greeting": said(1)[0][:-10] + b"\n",
}


@pytest.mark.parametrize("text", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_sent_away(reception: Reception, text: bytes) -> None:
    stranger = Caller(reception, text)
    assert (stranger.heard, reception.ranks) == ([], {})
    assert stranger.cut()
    assert Caller(reception, *said(1)).heard == [(1, {"rank": 1})]


def test_what_was_said_before_is_not_heard_again(reception: Reception) -> None:
    greeting, beat, failure = said(1, {"beat": 0}, {"failure": {"status": 1}})
    rank = Caller(reception, greeting, beat, failure)
    assert len(rank.heard) == 3
    assert rank.say(failure, beat, greeting) == []
    # Nor by another, while the rank is there or when it has gone.
    assert Caller(reception, greeting, failure).cut()
    rank.socket.close()
    assert hear(reception) == [(1, None)]
    assert Caller(reception, greeting, failure).cut()


def test_a_rank_speaks_for_itself_alone(reception: Reception) -> None:
    first, second = Caller(reception, *said(1)), Caller(reception, *said(2))
    _, failure = said(1, {"failure": {"status": 1}})
    assert second.say(failure) == []
    reception.send(end={"status": 1})
    assert first.say(first.socket.recv(1000)) == [], "what rank 0 has said came back to it"
    assert first.say(failure) == [(1, {"failure": {"status": 1}})]


def test_what_was_changed_on_the_way_is_not_heard(reception: Reception) -> None:
    greeting, failure = said(1, {"failure": {"status": 1}})
    rank = Caller(reception, greeting)
    for place in range(len(failure) - 1):
        changed = bytearray(failure)
        changed[place] ^= 1
        rank.socket.sendall(bytes(changed))
    assert hear(reception) == []
    assert rank.say(failure) == [(1, {"failure": {"status": 1}})]


def test_a_crowd_keeps_no_rank_out(reception: Reception, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [Caller(reception) for _ in range(70)]
    assert len(reception._strangers) == 64
    rank = Caller(reception, *said(1))
    crowd += [Caller(reception) for _ in range(3)]
    assert rank.heard == [(1, {"rank": 1})]
    assert list(reception.ranks) == [1]
    monkeypatch.setattr(module, "_STRANGER_SECONDS", 0.1)
    time.sleep(0.2)
    assert hear(reception) == []
    assert not reception._strangers
    assert list(reception.ranks) == [1]
    assert all(caller.cut() for caller in crowd)


def test_a_rank_s_line_has_an_end(reception: Reception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MESSAGE_BYTES", 1000)
    rank = Caller(reception, *said(1))
    assert rank.say(b"x" * 1001) == [(1, None)]
