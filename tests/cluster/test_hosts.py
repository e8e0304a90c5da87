"""Runs over hosts of the lab, through ssh, pdsh and the deepspeed launcher: what is computed, and what travels."""

import json
import signal
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.runs import (
    COMPARED,
    START_SECONDS,
    STEPS,
    command,
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

UNTIL = ("--set", f"training.stop_after.steps={COMPARED}")

# What shells, pdsh and the launcher would each make something else of.
ODD = {
    "ODD_SPACES": "two  blanks and 'quotes' \"double\"",
    "ODD_DOLLAR": "$HOME ${PATH} `id` $(id) \\ \\n !x",
    "ODD_PERCENT": "%h %n %u %% 100%",
    "ODD_GLOB": "/et* ; echo x & | > <",
    "ODD_EDGES": "  kept  ",
    "ODD_LINES": "one\ntwo\n",
    "ODD_EMPTY": "",
    "ODD_API_KEY": "sk-do-not-show",
}


@pytest.fixture(scope="module")
def on_one_host(lab: Lab, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """First losses of the run on host n2 alone, chosen by --include; the run is checked to have been there."""
    folder = tmp_path_factory.mktemp("one host")  # a path with a blank in it
    config = write_run(folder, corpus)
    arguments = ("--hostfile", write_hostfile(folder, n1=2, n2=2), "--include", "n2:1")
    with started(lab, "train", config, *arguments, *UNTIL) as process:
        wait_until(lambda: bool(lab.processes("n2", "-m megatron_ext.worker")), START_SECONDS)
        assert not lab.processes("n1", "megatron_ext.worker")
        assert not [line for line in lab.processes(None, "-m megatron_ext.worker") if "deepspeed" not in line]
        assert process.wait(START_SECONDS) == 0, output_of(config)
    return losses(config)


def test_tensor_parallel_over_hosts_and_a_killed_command(
    lab: Lab, corpus: Path, tmp_path: Path, on_one_host: list[float]
) -> None:
    cluster = {"environment": ["ODD_*"]}
    config = write_run(tmp_path, corpus, parallel={"tensor": 2, "zero_stage": 1}, cluster=cluster)
    arguments = ("train", config, "--hostfile", write_hostfile(tmp_path, n1=1, n2=1))
    environment = ODD | {"OMP_NUM_THREADS": "1", "NOT_LISTED": "x"}
    with started(lab, *arguments, env=environment) as process:
        wait_for_step(config, 2, process)
        there = environment_of(lab, "n2", rank_pid(lab, "n2"))
        process.signal(signal.SIGKILL)
        process.process.wait()
        nothing_left(lab, seconds=60)
    on_line = set(ODD) - {"ODD_EDGES", "ODD_LINES", "ODD_API_KEY"}
    assert {name: there.get(name) for name in on_line} == {name: ODD[name] for name in on_line}
    assert "NOT_LISTED" not in there
    assert not set(ODD) - on_line & set(there)
    assert (config.parent / "small" / "checkpoints" / "latest").exists()
    assert 2 <= len(losses(config)) < COMPARED
    with started(lab, *arguments, *UNTIL, env=environment) as process:
        assert process.wait(START_SECONDS) == 0, output_of(config)
    assert losses(config) == pytest.approx(on_one_host, abs=1e-4)
    assert "preflight passed" in output_of(config)
    assert "sk-do-not-show" not in output_of(config)
    assert errors_of(config) == []


def test_data_parallel_over_hosts_and_a_signal(
    lab: Lab, corpus: Path, tmp_path: Path, on_one_host: list[float]
) -> None:
    config = write_run(tmp_path, corpus)
    arguments = ("train", config, "--hostfile", write_hostfile(tmp_path, n1=1, n2=1, n3=1), "--exclude", "n1")
    with started(lab, *arguments) as process:
        wait_for_step(config, 2, process)
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 0, output_of(config)
        nothing_left(lab)
    done = len(losses(config))
    assert 2 <= done < STEPS
    assert (tmp_path / "small" / "checkpoints" / "latest").read_text() == f"step_{done}\n"
    assert losses(config)[:COMPARED] == pytest.approx(on_one_host[:done], abs=1e-4)
    assert not list((tmp_path / "small").glob(".launch-*"))
    assert errors_of(config) == []


def test_mistakes_are_one_message_and_run_nowhere(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, corpus)
    hosts = write_hostfile(tmp_path, n1=1, n2=1, n3=1)
    lab.cut("n2")
    cases: list[tuple[list[object], list[str]]] = [
        (["--hostfile", tmp_path / "none"], ["cannot be read"]),
        (["--hostfile", hosts, "--include", "n9"], ["no host n9"]),
        (["--include", "n1"], ["--hostfile"]),
        (["--hostfile", hosts, "--launcher", "rsh"], ["pdsh"]),
        (["--hostfile", hosts, "--exclude", "n3"], ["n2: cannot be reached over ssh"]),
        (["--hostfile", hosts, "--include", "n1", "--set", "cluster.interface=ib7"], ["n1: no interface ib7", "eth0"]),
    ]
    try:
        for arguments, words in cases:
            done = lab.run(command("train", config, *arguments), timeout=60)
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("error:") == 1
            assert all(word in done.stderr for word in words), done.stderr
    finally:
        lab.join("n2")
    nothing_left(lab)
    assert not (tmp_path / "small").exists()


def test_ranks_with_other_settings_do_not_train(lab: Lab, corpus: Path, tmp_path: Path) -> None:
    """A host's own login sets a variable that the launch node does not have, as PATH traps do."""
    config = write_run(tmp_path, corpus)
    hosts = write_hostfile(tmp_path, n1=1, n2=1)
    profile = tmp_path / "environment"
    profile.write_text("export CUBLAS_WORKSPACE_CONFIG=:16:8\n")
    assert lab.run(["mount", "--bind", str(profile), "/etc/bash.bashrc"], host="n2").returncode == 0
    try:
        with started(lab, "train", config, "--hostfile", hosts) as process:
            assert process.wait(START_SECONDS) == 2
    finally:
        lab.run(["umount", "/etc/bash.bashrc"], host="n2")
    (message,) = errors_of(config)
    assert "rank 1 on host n2 has the environment variable CUBLAS_WORKSPACE_CONFIG :16:8" in message
    assert "rank 0 on host n1 has unset" in message
    nothing_left(lab)
    assert json.loads(config.read_text())["name"] == "small"
