"""Ranks that fail in every way end together, with one message and the right status."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch._C._distributed_c10d import TCPStore

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.heartbeat import heartbeat
from megatron_ext.runtime.log import configure_logging
from megatron_ext.runtime.network import free_port
from megatron_ext.runtime.rendezvous import join_rendezvous

SECONDS = 2.0


def rank_main(rank: int, actions: tuple[str, ...], port: int, folder: Path) -> None:
    """Meet the others, then do what the rank's action says."""
    descriptor = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sizes = {"WORLD_SIZE": str(len(actions)), "LOCAL_SIZE": str(len(actions))}
    os.environ.update(sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    configure_logging(rank)
    rendezvous = join_rendezvous(rank_info(), seconds=60, run_dir=folder)
    with heartbeat(rendezvous, seconds=SECONDS, run_dir=folder) as beating:
        rendezvous.gather("ready", 0)
        try:
            names = {"os": os, "signal": signal, "time": time, "UserError": UserError, "part": beating._part}
            exec(actions[rank], names | {"folder": folder})
        except BaseException as error:
            beating.fail(error)


WAIT = "time.sleep(60)"
ECHO = "time.sleep(0.3); raise RuntimeError('gloo/transport/tcp/pair.cc: Connection closed by peer')"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
HANG = "os.kill(os.getpid(), signal.SIGSTOP)"


def outcome(
    folder: Path, *actions: str, attack: Callable[[int, int], None] | None = None
) -> tuple[list[int | None], str, float]:
    """Exit statuses of ranks that do ``actions``, everything they printed, and the seconds it took.

    ``attack`` gets the process id of rank 0 and the store's port.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_preload"])
    port = free_port()
    assert port is not None
    ranks = [
        context.Process(target=rank_main, args=(rank, actions, port, folder), daemon=True)
        for rank in range(len(actions))
    ]
    for rank in ranks:
        rank.start()
    start = time.monotonic()
    try:
        if attack is not None:
            attack(ranks[0].pid or 0, port)
        for rank in ranks:
            rank.join(60)
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
    return [rank.exitcode for rank in ranks], (folder / "output").read_text(), time.monotonic() - start


@pytest.mark.parametrize(
    ("actions", "statuses", "words"),
    [
        ((WAIT, KILL, ECHO), [1, -9, 1], ["rank 1 on host", "ended without a word"]),
        ((KILL, WAIT, ECHO), [-9, 1, 1], ["rank 0 on host", "ended without a word"]),
        ((WAIT, HANG, ECHO), [1, -9, 1], ["rank 1 on host", "no sign of life for 2 s"]),
        ((HANG, WAIT, ECHO), [-9, 1, 1], ["rank 0 on host", "no sign of life for 2 s"]),
        ((WAIT, WAIT, "raise OSError(28, 'No space left on device')"), [1, 1, 1], ["rank 2 on host", "No space left"]),
        (("raise ValueError('bug')", ECHO, WAIT), [1, 1, 1], ["rank 0 on host", "ValueError: bug"]),
        ((WAIT, "raise UserError('too small')", WAIT), [2, 2, 2], ["rank 1 on host", "too small"]),
    ],
    ids=["killed", "main killed", "hung", "main hung", "full disk", "bug", "bad input on one"],
)
def test_the_first_cause_is_said_once(
    tmp_path: Path, actions: tuple[str, ...], statuses: list[int], words: list[str]
) -> None:
    got, output, seconds = outcome(tmp_path, *actions)
    assert got == statuses, output
    (message,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert all(word in message for word in words), message
    assert output.count("Traceback") == sum("raise OSError" in a or "raise Value" in a for a in actions), output
    assert seconds < 40
    if statuses[1] != 2:
        assert json.loads((tmp_path / "failure.json").read_text())["rank"] == int(words[0].split()[1])


def test_a_mistake_that_all_ranks_find_names_none(tmp_path: Path) -> None:
    statuses, output, _ = outcome(tmp_path, *["raise UserError('seq_len is too long')"] * 3)
    assert (statuses, output) == ([2, 2, 2], "error: seq_len is too long\n")
    assert not (tmp_path / "failure.json").exists()


def test_an_echo_without_a_cause_keeps_its_traceback(tmp_path: Path) -> None:
    statuses, output, _ = outcome(tmp_path, WAIT, ECHO, WAIT)
    assert statuses == [1, 1, 1]
    assert "Traceback" in output
    assert "error: rank 1 on host" in output


def test_ranks_that_are_done_leave_one_after_another(tmp_path: Path) -> None:
    statuses, output, _ = outcome(tmp_path, "pass", "time.sleep(3)", "time.sleep(1)")
    assert (statuses, output) == ([0, 0, 0], "")


def test_ranks_that_load_for_longer_than_the_limit_are_not_given_up(tmp_path: Path) -> None:
    statuses, output, _ = outcome(tmp_path, WAIT.replace("60", "5"), "time.sleep(5)")
    assert (statuses, output) == ([0, 0], "")


BREAK_MONITOR = "part._reception.hear = lambda seconds: [][0]; " + WAIT
BREAK_LINK = "part._channel.messages = lambda: [][0]; " + WAIT


@pytest.mark.parametrize(
    ("actions", "culprit"), [((BREAK_MONITOR, WAIT), 0), ((WAIT, BREAK_LINK), 1)], ids=["of rank 0", "of rank 1"]
)
def test_a_heartbeat_that_breaks_is_a_failure_that_is_told(
    tmp_path: Path, actions: tuple[str, ...], culprit: int
) -> None:
    statuses, output, _ = outcome(tmp_path, *actions)
    assert statuses == [1, 1], output
    (message,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert message.startswith(f"error: rank {culprit} on host")
    assert "the heartbeat broke off: IndexError" in message
    assert output.count("Traceback") == 1


def test_a_rank_that_has_left_has_nothing_more_to_say(tmp_path: Path) -> None:
    late = "{'rank': 1, 'text': 'late', 'status': 1, 'kind': 'error', 'trace': ''}"
    statuses, output, _ = outcome(tmp_path, "time.sleep(2)", f"part.close(); part._channel.send(failure={late})")
    assert (statuses, output) == ([0, 0], "")


UNTIL_DONE = "deadline = time.monotonic() + 50\nwhile not (folder / 'done').exists():\n    time.sleep(0.05)\n"
FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (192, 192))\n"


def listening(pid: int) -> list[tuple[str, int]]:
    """Addresses at which a process listens."""
    connections = psutil.Process(pid).net_connections("tcp")
    return [(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN]


@contextmanager
def strangers(port: int, count: int = 1) -> Iterator[list[socket.socket]]:
    """Connections to a port; the other end may cut them at any moment."""
    opened = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(count)]
    try:
        yield opened
    finally:
        for each in opened:
            each.close()


def test_strangers_on_the_ports_change_nothing(tmp_path: Path) -> None:
    def attack(pid: int, store_port: int) -> None:
        store = TCPStore("127.0.0.1", store_port, 2, is_master=False, timeout=timedelta(seconds=60))
        sealed = store.get("attempt0/heartbeat")
        port = json.loads(sealed[64:])["port"]
        assert set(listening(pid)) == {("127.0.0.1", port), ("127.0.0.1", store_port)}
        assert not list(tmp_path.glob(".secret-*"))
        forged = {"rank": 1, "text": "FORGED", "status": 0, "kind": "error"}
        said = [
            b"GET / HTTP/1.0\r\n\r\n",
            b"[]\n",
            b"[" * 150 + b"\n",
            b"\xff\xfe\x00" * 50 + b"\n",
            b"\n" * 200,
            json.dumps({"rank": 1, "key": "", "failure": forged}).encode() + b"\n",
            sealed + b"\n",
            b"0" * 64 + json.dumps({"number": 1, "rank": 1}).encode() + b"\n",
            b"",
        ]
        before = psutil.Process(pid).memory_info().rss
        for text in said:
            with strangers(port) as (stranger,):
                stranger.sendall(text)
                if not text:
                    stranger.shutdown(socket.SHUT_WR)
                with suppress(ConnectionError):
                    assert stranger.recv(1) == b"", "an answer to a stranger"
        with strangers(port) as (stranger,), suppress(ConnectionError):
            for _ in range(100):
                stranger.sendall(b"x" * 1_000_000)
            pytest.fail("100 MB without a line were taken")
        assert psutil.Process(pid).memory_info().rss - before < 30_000_000
        with strangers(port, 700), strangers(store_port, 20):
            time.sleep(1.5 * SECONDS)
        (tmp_path / "done").touch()

    statuses, output, _ = outcome(tmp_path, FEW_FILES + UNTIL_DONE, UNTIL_DONE, attack=attack)
    assert (statuses, output) == ([0, 0], "")
