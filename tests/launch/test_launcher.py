"""How ranks are started on this machine; signals and whole runs are tested in tests/train, hosts in tests/cluster."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.launch import hosts, launcher
from megatron_ext.launch.hosts import signal_job
from megatron_ext.launch.launcher import start_ranks, this_machine
from megatron_ext.runtime.network import free_port
from tests.config.builders import small_config

# Stands for deepspeed's launcher: says how it was called, then is a rank's parent for as long as the rank lives.
_DEEPSPEED = """
import json, os, subprocess, sys
from pathlib import Path
at = sys.argv.index("--module")
config = Path(sys.argv[at + 2])
seen = {"arguments": sys.argv[1:], "cwd": os.getcwd(), "config": json.loads(config.read_text())}
seen |= {name: os.environ.get(name) for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
config.parents[1].joinpath("called").write_text(json.dumps(seen))
sys.exit(subprocess.call([sys.executable, "-c", RANK, "megatron_ext.worker"]) % 256)
"""
_RANK = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(60)"


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of deepspeed's launcher; what its one rank does stands in a file beside it."""
    (tmp_path / "deepspeed").write_text(f"RANK = {_RANK!r}\n{_DEEPSPEED}")
    monkeypatch.setattr(launcher, "find_program", lambda name: str(tmp_path / name))
    return tmp_path


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_start_from_the_resolved_config_and_stop_on_request(rank: Path) -> None:
    config = small_config(output_dir=str(rank / "runs"))
    with start_ranks(this_machine(3), config, worker_options=["--preflight-only"], output=rank / "out") as ranks:
        wait_for(config.run_dir / "called")
        assert ranks.poll() is None
        time.sleep(0.5)
        ranks.ask_to_stop()
        deadline = time.monotonic() + 60
        while (status := ranks.poll()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert status == 0, (rank / "out").read_text()
    seen = json.loads((config.run_dir / "called").read_text())
    assert seen["config"] == config.model_dump(mode="json")
    arguments = seen["arguments"]
    assert arguments[arguments.index("--num_gpus") + 1] == "3"
    assert arguments[arguments.index("--module") + 1] == "megatron_ext.worker"
    assert arguments[-3:] == ["--directory", str(Path.cwd()), "--preflight-only"]
    assert seen["cwd"] == str(Path.cwd())
    assert not list(config.run_dir.glob(".launch-*"))


def test_what_is_closed_leaves_nothing(rank: Path) -> None:
    config = small_config(output_dir=str(rank / "runs"))
    ranks = start_ranks(this_machine(1), config)
    wait_for(config.run_dir / "called")
    job = ranks._orders.job
    ranks.close()
    assert signal_job(job, 0) == 0
    assert not list(config.run_dir.glob(".launch-*"))


def test_port_in_use_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--master-port {port} is in use there"):
            start_ranks(this_machine(1, master_port=port), small_config(output_dir=str(tmp_path / "runs")))
        assert free_port(port) is None
    assert not (tmp_path / "runs" / "run").exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory: .*set output_dir"):
        start_ranks(this_machine(1), small_config(output_dir=str(tmp_path / "file")))


def test_a_host_answers_over_ssh_what_this_machine_answers_by_a_call() -> None:
    command = [sys.executable, "-m", "megatron_ext.launch.hosts", "report", json.dumps([["/", "/nowhere"], None])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = hosts.HostReport(**json.loads(done.stdout))
    here = hosts.report(["/", "/nowhere"], None)
    assert (said.addresses, said.cores, said.gpus, said.missing) == (
        here.addresses,
        here.cores,
        here.gpus,
        ["/nowhere"],
    )
    assert said.port is not None
