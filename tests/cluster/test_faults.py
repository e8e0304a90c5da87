"""Faults of a run over two hosts: it ends on both within a minute, names the first cause, and leaves no process."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.runs import (
    command,
    endless,
    environment_of,
    errors_of,
    losses,
    nothing_left,
    output_of,
    rank_pid,
    started,
    wait_for_step,
    wait_until,
    write_hostfile,
    write_run,
)

LIMIT = 60.0
"""Seconds from a fault to the end of the command."""


def send(lab: Lab, host: str, number: signal.Signals) -> None:
    assert lab.run(["kill", f"-{number.value}", str(rank_pid(lab, host))], host=host).returncode == 0


@pytest.mark.parametrize(
    ("host", "number", "words"),
    [
        ("n2", signal.SIGKILL, "rank 1 on host n2 ended without a word"),
        ("n1", signal.SIGSTOP, "rank 0 on host n1 has given no sign of life"),
    ],
    ids=["killed rank", "hung rank 0"],
)
def test_a_rank_that_is_gone(
    lab: Lab, corpus: Path, tmp_path: Path, *, host: str, number: signal.Signals, words: str
) -> None:
    config = write_run(tmp_path, corpus, **endless())
    hosts = write_hostfile(tmp_path, n1=1, n2=1)
    with started(lab, "train", config, "--hostfile", hosts) as process:
        wait_for_step(config, 2, process)
        send(lab, host, number)
        assert process.wait(LIMIT) == 1
        nothing_left(lab)
    (message,) = errors_of(config)
    assert message.startswith(f"error: {words}")
    assert json.loads((tmp_path / "small" / "failure.json").read_text())["host"] == host
    assert "Traceback" not in output_of(config)


def test_a_host_that_is_cut_off(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus, **endless())
    hosts = write_hostfile(tmp_path, n1=1, n2=1)
    with started(lab, "train", config, "--hostfile", hosts) as process:
        wait_for_step(config, 2, process)
        lab.cut("n2")
        cut = time.monotonic()
        try:
            assert process.wait(LIMIT) == 1
            nothing_left(lab, "n1")
            # Nobody can reach it: its rank ends by itself.
            nothing_left(lab, "n2", seconds=LIMIT - (time.monotonic() - cut))
        finally:
            lab.join("n2")
    (message,) = errors_of(config)
    assert message.startswith("error: rank 1 on host n2 has given no sign of life")


def test_a_full_disk_on_one_host(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus, checkpoint={"every": {"steps": 8}, "keep_last": 1}, **endless())
    hosts = write_hostfile(tmp_path, n1=1, n2=1)
    checkpoints = tmp_path / "small" / "checkpoints"
    upper = tmp_path / "upper"
    upper.mkdir()
    # The host goes on to see what others write, and has a page of its own to write to.
    overlay = f"lowerdir={checkpoints},upperdir={upper}/files,workdir={upper}/work,volatile"
    full = (
        f"mount -t tmpfs -o size=16k full {upper} && mkdir {upper}/files {upper}/work && "
        f"mount -t overlay -o {overlay} overlay {checkpoints}"
    )
    with started(lab, "train", config, "--hostfile", hosts) as process:
        wait_for_step(config, 9, process)
        done = lab.run(["sh", "-c", full], host="n2")
        try:
            if done.returncode != 0:
                pytest.skip(f"no overlay file system here: {done.stderr}")
            assert process.wait(LIMIT) == 2, output_of(config)
            nothing_left(lab)
        finally:
            process.end()
            lab.run(["sh", "-c", f"umount {checkpoints}; umount {upper}"], host="n2")
    (message,) = errors_of(config)
    assert message.startswith("error: rank 1 on host n2: the checkpoint after step")
    assert "Traceback" not in output_of(config)


_STRANGER = """
import json, socket, sys
host, ports = sys.argv[1], json.loads(sys.argv[2])
forged = json.dumps({"rank": 1, "failure": {"rank": 1, "text": "FORGED", "status": 0, "kind": "error"}}).encode()
lines = (b"[]\\n", forged + b"\\n", b"0" * 64 + forged + b"\\n", b"\\xff" * 5000)
for port in ports:
    for text in (b"GET / HTTP/1.0\\r\\n\\r\\n", *lines):
        with socket.create_connection((host, port), timeout=10) as stranger:
            stranger.sendall(text)
crowd = [socket.create_connection((host, port), timeout=10) for port in ports for _ in range(100)]
"""


def test_strangers_from_another_host(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus, **endless())
    hosts = write_hostfile(tmp_path, n1=1, n2=1)
    with started(lab, "train", config, "--hostfile", hosts) as process:
        wait_for_step(config, 2, process)
        for host in ("n1", "n2"):
            pid = rank_pid(lab, host)
            listed = lab.run(["ss", "-Hltnp"], host=host).stdout.splitlines()
            places = [line.split()[3].rpartition(":") for line in listed if f"pid={pid}," in line]
            assert places, listed
            (address,) = {place[0] for place in places}
            assert address not in ("0.0.0.0", "*", "[::]"), "open to all networks"
            ports = json.dumps([int(place[2]) for place in places])
            done = lab.run([sys.executable, "-c", _STRANGER, address, ports], host="n3")
            assert done.returncode == 0, done.stderr
        secret = secret_of(tmp_path)
        for each in (*lab.hosts, None):
            assert not lab.processes(each, secret), "on a command line, for everybody to read"
        before = len(losses(config))
        time.sleep(7.5)  # longer than the heartbeat needs to miss a rank
        assert len(losses(config)) > before
        process.signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0, output_of(config)
        nothing_left(lab)
    assert errors_of(config) == []


def secret_of(folder: Path) -> str:
    """The secret of the run that goes on in ``folder``, from the file that travels to its hosts."""
    (file,) = folder.glob("small/.launch-*/environment.json")
    assert file.stat().st_mode & 0o077 == 0
    secret: str = json.loads(file.read_text())["MEGATRON_EXT_SECRET"]
    return secret


@pytest.mark.slow
def test_a_link_that_preflight_refuses(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    hosts = write_hostfile(tmp_path, n2=1, n3=1)
    limits = ["--set", "cluster.preflight.min_bandwidth_gb_per_second=100000"]
    done = lab.run(command("preflight", config, "--hostfile", hosts, *limits), timeout=240)
    assert done.returncode == 2, done.stderr
    (message,) = (line for line in done.stderr.splitlines() if "error: " in line)
    assert "the slowest link is that between n2 and n3" in message
    nothing_left(lab)


def test_a_host_whose_files_are_its_own(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    hosts = write_hostfile(tmp_path, n1=1, n2=1)
    assert lab.run(["mount", "-t", "tmpfs", "own", str(tmp_path)], host="n2").returncode == 0
    try:
        done = lab.run(command("train", config, "--hostfile", hosts), timeout=LIMIT)
    finally:
        lab.run(["umount", str(tmp_path)], host="n2")
    assert done.returncode == 2
    assert "n2: " in done.stderr
    assert "is not there; the file system has to be shared" in done.stderr
    assert "n1: " not in done.stderr


@pytest.mark.slow
def test_two_ranks_of_one_host(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    """On one host as well: a hung rank does not keep the other, nor the launcher."""
    config = write_run(tmp_path, corpus, **endless())
    with started(lab, "train", config, "--nproc", "2") as process:
        wait_for_step(config, 2, process)
        ranks = [line for line in lab.processes(None, "-m megatron_ext.worker") if "deepspeed" not in line]
        pids = [int(line.split()[1]) for line in ranks]
        victim = next(pid for pid in pids if environment_of(lab, None, pid)["LOCAL_RANK"] == "1")
        lab.run(["kill", "-STOP", str(victim)])
        wait_until(lambda: process.process.poll() is not None, LIMIT, lambda: output_of(config))
        assert process.process.returncode == 1
        nothing_left(lab)
    assert errors_of(config)[0].startswith("error: rank 1 on host login has given no sign of life")
