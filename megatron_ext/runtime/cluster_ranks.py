"""The place of a process that srun or mpirun started, which say it in their own variables."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.errors import UserError

_PORTS_FROM, _PORTS = 20000, 10000
_MAX_HOSTS = 100_000


@dataclass(frozen=True)
class Place:
    """Values of the variables that torchrun and the deepspeed launcher set."""

    rank: str
    local_rank: str
    world_size: str
    local_world_size: str
    master_address: str
    master_port: str


def place_by_srun(environment: Mapping[str, str]) -> Place | None:
    """The place of a task of a job step, or None where srun did not start this process.

    A batch script carries most of SLURM's variables too, but is no step.

    Raises:
        UserError: SLURM's variables are not what its manual says.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    tasks = _get(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    node = int(_get(environment, "SLURM_NODEID"))
    per_node = _tasks_per_node(_get(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if not 0 <= node < len(per_node):
        raise UserError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE names {len(per_node)} nodes")
    hosts = expand_hosts(_get(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    return Place(
        rank=environment["SLURM_PROCID"],
        local_rank=_get(environment, "SLURM_LOCALID"),
        world_size=tasks,
        local_world_size=str(per_node[node]),
        master_address=environment.get("MASTER_ADDR", hosts[0]),
        master_port=environment.get("MASTER_PORT") or _port_of(_get(environment, "SLURM_JOB_ID")),
    )


def place_by_mpirun(environment: Mapping[str, str]) -> Place | None:
    """The place of a process of Open MPI's mpirun, or None where it did not start this process.

    Raises:
        UserError: the ranks are on several hosts, and nothing says where they meet.
    """
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    world, local = _get(environment, "OMPI_COMM_WORLD_SIZE"), _get(environment, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if world != local and "MASTER_ADDR" not in environment:
        raise UserError(
            "mpirun started ranks on several hosts and does not say where rank 0 is; set MASTER_ADDR to the address of "
            "the first host and pass it on: mpirun -x MASTER_ADDR -x MASTER_PORT ..."
        )
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "0")
    return Place(
        rank=environment["OMPI_COMM_WORLD_RANK"],
        local_rank=_get(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=world,
        local_world_size=local,
        master_address=environment.get("MASTER_ADDR", "127.0.0.1"),
        master_port=environment.get("MASTER_PORT") or _port_of(job),
    )


def expand_hosts(text: str) -> list[str]:
    """Names of a SLURM node list such as ``n[1-3,07],gpu5``, in its order.

    Raises:
        UserError: it is not of that form.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            middles = [literal] if literal else _expand_ranges(ranges, text)
            expanded = [begin + middle for begin in expanded for middle in middles]
            if len(expanded) > _MAX_HOSTS:
                raise UserError(f"the node list {text!r} names more than {_MAX_HOSTS} hosts")
        names += expanded
    if not names:
        raise UserError("the node list is empty")
    return names


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise UserError(f"the node list {text!r} is not of the form NAME[FIRST-LAST,...]")
        first, last = match[1], match[2] or match[1]
        if int(last) - int(first) >= _MAX_HOSTS:
            raise UserError(f"the node list {text!r} names more than {_MAX_HOSTS} hosts")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` is 2 on each of three nodes and 1 on the fourth."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _port_of(job: str) -> str:
    """A port that differs between the jobs of a host, and that all ranks of one find without a word."""
    digits = re.sub(r"\D", "", job)[-9:]
    return str(_PORTS_FROM + int(digits or 0) % _PORTS)


def _get(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if name in environment:
            return environment[name]
    raise UserError(f"environment variable {names[0]} is not set although this process was started by srun or mpirun")
