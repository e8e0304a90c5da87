"""The place of a rank, as each launcher says it."""

import os

import pytest

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import RankInfo, first_host, rank_info

SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[1-3]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "7",
}
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> RankInfo:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMIX_", "MASTER_", "LOCAL_", "WORLD_SIZE")) or name == "RANK":
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return rank_info()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, RankInfo(0, 0, 1, 1, "127.0.0.1", 0)),
        (SRUN, RankInfo(3, 1, 5, 2, "n1", 23456)),
        (SRUN | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "99"}, RankInfo(3, 1, 5, 2, "10.1.1.1", 99)),
        (MPIRUN, RankInfo(1, 1, 2, 2, "127.0.0.1", 20007)),
        (LAUNCHED | {"LOCAL_SIZE": "1"}, RankInfo(1, 0, 2, 1, "10.0.0.1", 29500)),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "1"} | SRUN, RankInfo(1, 0, 2, 1, "10.0.0.1", 29500)),
        # A batch script has most of SLURM's variables and is no step.
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"}, RankInfo(0, 0, 1, 1, "127.0.0.1", 0)),
    ],
    ids=["none", "srun", "srun with an address", "mpirun", "deepspeed", "torchrun in a step", "batch script"],
)
def test_every_launcher_is_understood(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: RankInfo
) -> None:
    assert place(monkeypatch, environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR"),
        ({"RANK": "0"}, "LOCAL_RANK|LOCAL_SIZE"),
        (LAUNCHED | {"LOCAL_SIZE": "one"}, "LOCAL_SIZE is 'one', not a number"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE is 'two'"),
        (SRUN | {"SLURM_NODEID": "7"}, "SLURM_NODEID is 7"),
    ],
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        place(monkeypatch, environment)


@pytest.mark.parametrize(
    ("text", "name"),
    [("n1", "n1"), ("n[1-3,07],gpu5", "n1"), ("a[08-10]-ib", "a08-ib"), ("r[1-2]n[1-2]", "r1n1"), ("a,b[1-2]", "a")],
)
def test_first_host_of_node_lists(text: str, name: str) -> None:
    assert first_host(text) == name


@pytest.mark.parametrize("text", ["", "n[1-x]", "n[1-2", ",n1"])
def test_bad_node_lists(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        first_host(text)
