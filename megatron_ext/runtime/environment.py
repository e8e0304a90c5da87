"""What the launcher says about this process, and what must be set before DeepSpeed is imported."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.runtime.cluster_ranks import Place, place_by_mpirun, place_by_srun


@dataclass(frozen=True)
class RankInfo:
    """Place of this process in the job, as the deepspeed launcher, torchrun, srun or mpirun says it."""

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


def rank_info() -> RankInfo:
    """Read the launcher's variables: the deepspeed launcher's, torchrun's, srun's or mpirun's.

    Returns:
        The place of this process; a process started by no launcher is a job of one rank on a free port.

    Raises:
        UserError: a variable is missing or is no number.
    """
    place = _place_by_launcher() if "RANK" in os.environ else place_by_srun(os.environ) or place_by_mpirun(os.environ)
    if place is None:
        return RankInfo(
            rank=0, local_rank=0, world_size=1, local_world_size=1, master_address="127.0.0.1", master_port=0
        )
    numbers = {name: _number(name, text) for name, text in asdict(place).items() if name != "master_address"}
    return RankInfo(master_address=place.master_address, **numbers)


def _place_by_launcher() -> Place:
    local_world_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    return Place(
        rank=_text("RANK"),
        local_rank=_text("LOCAL_RANK"),
        world_size=_text("WORLD_SIZE"),
        local_world_size=_text(local_world_size),
        master_address=_text("MASTER_ADDR"),
        master_port=_text("MASTER_PORT"),
    )


SUPERVISOR = "MEGATRON_EXT_SUPERVISOR"
"""Variable with the process id of the command that started the ranks of this machine."""


def supervisor() -> int | None:
    """Process id of the command that started this rank, or None where a launcher was called by hand."""
    return _number(SUPERVISOR, _text(SUPERVISOR)) if SUPERVISOR in os.environ else None


def prepare_libraries(info: RankInfo, accelerator: str) -> None:
    """Set what DeepSpeed and torch read from the environment; call before anything imports DeepSpeed or megatron-core.

    megatron-core decorates its fused functions with ``torch.compile`` when it is imported, which loads the compiler:
    two of the eight seconds in which a rank starts. This package calls none of them and compiles nothing, so the
    decorator is told to do nothing; ``TORCHDYNAMO_DISABLE=0`` in the environment leaves it on.

    Args:
        info: Place of this process, for one that no launcher started.
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


def use_interface(name: str) -> None:
    """Make gloo and NCCL talk over a network interface, unless the user's environment says over which."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
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


def variables_like(patterns: Iterable[str]) -> dict[str, str]:
    """Variables of this process whose names fit one of the patterns (globs)."""
    wanted = tuple(patterns)
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, item) for item in wanted)}


def _text(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise UserError(f"environment variable {name} is not set although RANK is; start through `megatron-ext train`")
    return value


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name.upper()} is {text!r}, not a number; start through `megatron-ext train`")
    return int(text)
