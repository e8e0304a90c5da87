"""A run of two ranks, as a user starts it, and strangers at every port of it."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import psutil

from tests.train.small_run import (
    rank_processes,
    started,
    train_records,
    wait_for_step,
    write_config,
    write_corpus,
)

SAID = (b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"\xff" * 5000, b"")


def listening(pid: int) -> list[tuple[str, int]]:
    connections = psutil.Process(pid).net_connections("tcp")
    return [(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN]


def test_ports_are_for_this_host_and_what_strangers_say_there_is_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 100_000}}
    config = write_config(tmp_path, training=training, cluster={"heartbeat_seconds": 3.0})
    run = tmp_path / "small"
    with started("train", str(config), "--nproc", "2") as process:
        wait_for_step(run, 2, process)
        processes = [psutil.Process(pid) for pid in rank_processes(run)]
        ports = {address for each in processes for address in listening(each.pid)}
        assert {host for host, _ in ports} == {"127.0.0.1"}
        # The secret is in the ranks' environment and nowhere else: not on a command line, not in a file.
        (secret,) = {each.environ()["MEGATRON_EXT_SECRET"] for each in processes}
        assert re.fullmatch("[0-9a-f]{64}", secret)
        assert not [each for each in processes if secret in " ".join(each.cmdline())]
        assert not [file for file in run.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
        for address in ports:
            for text in SAID:
                with socket.create_connection(address) as stranger:
                    stranger.sendall(text)
        before = len(train_records(run))
        # Longer than the heartbeat needs to miss a rank.
        time.sleep(4.5)
        assert process.poll() is None
        assert len(train_records(run)) > before
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
