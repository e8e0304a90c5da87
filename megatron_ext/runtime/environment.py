"""What the environment says: the rank of this process, what libraries read, how kernels are built.

The one place that reads and sets environment variables.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ext.errors import UserError

_PORTS_FROM, _PORTS = 20000, 10000
_OMPI_JOB = "OMPI_MCA_ess_base_jobid"


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks of the job, as the deepspeed launcher, torchrun, srun or mpirun says it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes logs and metrics."""
        return self.rank == 0

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks are on this host."""
        return self.local_world_size == self.world_size


def rank_info() -> RankInfo:
    """Read the launcher's variables: the deepspeed launcher's, torchrun's, srun's or mpirun's.

    Returns:
        The rank of this process; a process started by no launcher is a job of one rank on a free port.

    Raises:
        UserError: a variable is missing or not of the form that its launcher gives it, or mpirun has started ranks on
            several hosts and nothing says where rank 0 is.
    """
    if "RANK" in os.environ:
        return _rank_by_torchrun()
    # A batch script carries most of SLURM's variables too, but is no step.
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return _rank_by_srun()
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return _rank_by_mpirun()
    return RankInfo(rank=0, local_rank=0, world_size=1, local_world_size=1, master_address="127.0.0.1", master_port=0)


def _rank_by_torchrun() -> RankInfo:
    """What torchrun and the deepspeed launcher set."""
    return RankInfo(
        rank=_number("RANK"),
        local_rank=_number("LOCAL_RANK"),
        world_size=_number("WORLD_SIZE"),
        local_world_size=_number("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"),
        master_address=_text("MASTER_ADDR"),
        master_port=_number("MASTER_PORT"),
    )


def _rank_by_srun() -> RankInfo:
    node = _number("SLURM_NODEID")
    per_node = _tasks_per_node(_text("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if node >= len(per_node):
        raise UserError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE names {len(per_node)} nodes")
    first = first_host(_text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    return RankInfo(
        rank=_number("SLURM_PROCID"),
        local_rank=_number("SLURM_LOCALID"),
        world_size=_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_world_size=per_node[node],
        master_address=os.environ.get("MASTER_ADDR", first),
        master_port=_master_port(_text("SLURM_JOB_ID")),
    )


def _rank_by_mpirun() -> RankInfo:
    world, local = _number("OMPI_COMM_WORLD_SIZE"), _number("OMPI_COMM_WORLD_LOCAL_SIZE")
    if world != local and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "mpirun started ranks on several hosts and does not say where rank 0 is; set MASTER_ADDR to the address of "
            "the first host and pass it on: mpirun -x MASTER_ADDR -x MASTER_PORT ..."
        )
    return RankInfo(
        rank=_number("OMPI_COMM_WORLD_RANK"),
        local_rank=_number("OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=world,
        local_world_size=local,
        master_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_master_port(os.environ.get("PMIX_NAMESPACE") or os.environ.get(_OMPI_JOB, "0")),
    )


def _master_port(job: str) -> int:
    """MASTER_PORT, or one that differs between the jobs of a host, and that all ranks of one find without a word."""
    if os.environ.get("MASTER_PORT"):
        return _number("MASTER_PORT")
    digits = re.sub(r"\D", "", job)[-9:]
    return _PORTS_FROM + int(digits or 0) % _PORTS


def _text(*names: str) -> str:
    """The value of the first of ``names`` that is set."""
    for name in names:
        if name in os.environ:
            return os.environ[name]
    raise UserError(
        f"environment variable {names[0]} is not set although others of its launcher are; start through "
        "`megatron-ext train`, torchrun, srun or mpirun"
    )


def _number(*names: str) -> int:
    text = _text(*names)
    if not text.isdigit():
        raise UserError(f"{names[0]} is {text!r}, not a number; start through `megatron-ext train`")
    return int(text)


def first_host(text: str) -> str:
    """The first name of a SLURM node list: of ``n[1-3,07],gpu5`` it is n1.

    Raises:
        UserError: it is not of that form.
    """
    match = re.match(r"(?:[^,\[\]]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+(?=,|$)", text)
    if match is None:
        raise UserError(f"the node list {text!r} is not of the form NAME[FIRST-LAST,...],NAME")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` is 2 on each of three nodes and 1 on the fourth."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def prepare_libraries(info: RankInfo, accelerator: str) -> None:
    """Set what DeepSpeed and torch read from the environment; call before anything imports DeepSpeed or megatron-core.

    megatron-core decorates its fused functions with ``torch.compile`` when it is imported, which loads the compiler:
    two of the eight seconds in which a rank starts. This package calls none of them and compiles nothing, so the
    decorator is told to do nothing; ``TORCHDYNAMO_DISABLE=0`` in the environment leaves it on.

    Args:
        info: This process, for one that no launcher started.
        accelerator: "cpu" or "cuda". DeepSpeed probes for devices at import and, where it finds none, falls back in
            ways that differ between releases. A choice that the user made in the environment stays.
    """
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("LOCAL_RANK", str(info.local_rank))
    if info.world_size > 1:
        # Where one of these is missing, as under srun, DeepSpeed asks MPI.
        os.environ.setdefault("RANK", str(info.rank))
        os.environ.setdefault("WORLD_SIZE", str(info.world_size))
        os.environ.setdefault("LOCAL_SIZE", str(info.local_world_size))
        os.environ.setdefault("MASTER_ADDR", info.master_address)
        os.environ.setdefault("MASTER_PORT", str(info.master_port))


def job_attempt() -> str:
    """Which attempt of the job this is: torchrun starts ranks again beside the store of the attempt before."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def agent_keeps_store() -> bool:
    """Whether torchrun's agent serves the store at MASTER_ADDR, so that rank 0 must not."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


REQUEUE = "MEGATRON_EXT_REQUEUE"
"""Set to 1 by a job script that starts the run again when a worker says that it was stopped before its end."""


def asks_to_requeue() -> bool:
    """Whether the caller wants to hear (by the exit status) that the run was stopped before its end."""
    return os.environ.get(REQUEUE) == "1"


SECRET = "MEGATRON_EXT_SECRET"
"""Variable with what the ranks of a run know and nobody else (runtime/secret.py)."""


def launcher_secret() -> str | None:
    """The secret that a launcher has given to the ranks, or None."""
    return os.environ.get(SECRET) or None


def use_interface(name: str, *, nccl: bool = True) -> None:
    """Make gloo, and NCCL, talk over a network interface, unless the user's environment says over which."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not nccl:
        return
    # Without "=" NCCL takes every interface whose name begins like this.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


PRIVATE_VARIABLES = "MEGATRON_EXT_PRIVATE_VARIABLES"
"""Variable with the path of a JSON file of further variables, which only this user can read."""


def take_private_variables() -> None:
    """Take over the variables that came in a file, because a command line is for everybody to read.

    Raises:
        UserError: the file cannot be read.
    """
    path = os.environ.get(PRIVATE_VARIABLES)
    if path is None:
        return
    try:
        variables = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the variables of cluster.environment cannot be read on this host: {error}") from error
    os.environ.update(variables)


def find_program(name: str) -> str | None:
    """Path of a program that is installed beside this Python, or else on PATH; None where there is none."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def current_environment() -> dict[str, str]:
    """All variables of this process, for the environment of another."""
    return dict(os.environ)


def variables_like(patterns: Iterable[str]) -> dict[str, str]:
    """Variables of this process whose names fit one of the patterns (globs)."""
    wanted = tuple(patterns)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, item) for item in wanted)}


CACHE_VARIABLE = "MEGATRON_EXT_KERNEL_CACHE"
AHEAD_VARIABLE = "MEGATRON_EXT_BUILD_KERNELS"


@dataclass(frozen=True)
class KernelEnvironment:
    """The variables, with defaults filled in."""

    cache: Path
    """Where libraries that were built are kept: MEGATRON_EXT_KERNEL_CACHE."""

    compiler: str
    """C++ compiler: CXX, or g++."""

    cuda_home: Path | None
    """Where the CUDA toolkit is: CUDA_HOME or CUDA_PATH; None leaves the search to PATH and /usr/local/cuda."""

    architectures: str | None
    """TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX"; None where it is unset or empty."""

    jobs: int
    """Compilers to run at once: MAX_JOBS, or the cores that this process may use."""

    ahead: str | None
    """MEGATRON_EXT_BUILD_KERNELS: what an installation compiles ahead of time; None where it is unset or empty."""


def kernel_environment() -> KernelEnvironment:
    """Read the environment as it is now."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    jobs = os.environ.get("MAX_JOBS", "")
    return KernelEnvironment(
        cache=Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "megatron-ext" / "kernels"),
        compiler=os.environ.get("CXX") or "g++",
        cuda_home=Path(home) if home else None,
        architectures=os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or None,
        jobs=int(jobs) if jobs.isdigit() and int(jobs) else len(os.sched_getaffinity(0)),
        ahead=os.environ.get(AHEAD_VARIABLE, "").strip() or None,
    )
