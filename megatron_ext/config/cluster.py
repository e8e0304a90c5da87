"""The cluster section: what several hosts agree on, how they are examined, when a silent rank is given up."""

from typing import Annotated, Final, Literal

from pydantic import Field

from megatron_ext.base import NonNegativeFloat, PositiveFloat, PositiveInt, Section

_NAME_OR_GLOB = r"^[A-Za-z_*?][A-Za-z0-9_*?]*$"
_INTERFACE = r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$"

ALWAYS_FORWARDED: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "DS_ACCELERATOR",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "NCCL_*",
    "GLOO_*",
    "TORCH_*",
    "PYTORCH_*",
    "MEGATRON_EXT_KERNEL_*",
)
"""Variables that change how a run computes or communicates: they travel to every host without being listed."""


class PreflightConfig(Section):
    """What each host is asked before a run trains; the first host that fails is named and the run ends."""

    when: Literal["auto", "always", "never"] = "auto"
    """auto: where there is more than one host."""

    timeout_seconds: PositiveFloat = 45.0
    """The whole of it; a host that has not answered by then has failed."""

    min_free_gib: NonNegativeFloat = 1.0
    """Free space of the run directory's file system, as each host sees it."""

    max_clock_skew_seconds: PositiveFloat = 5.0
    """Difference between a host's clock and rank 0's; more of it confuses logs and the times of files."""

    min_bandwidth_gb_per_second: NonNegativeFloat = 0.0
    """Bus bandwidth of an all-reduce over all ranks (10^9 bytes per second); where it is missed, the slowest link
    between hosts is named. 0: measured only."""

    message_mib: PositiveInt = 16
    """Size of that all-reduce."""

    min_matmul_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Matrix multiplication rate of each rank, as a share of the fastest rank's; by default 0.7 on GPUs, and
    measured only on CPUs, whose cores other programs share."""


class ClusterConfig(Section):
    """Runs over several hosts; the section changes nothing about what is computed."""

    environment: tuple[Annotated[str, Field(pattern=_NAME_OR_GLOB)], ...] = ()
    """Names (or globs such as ``MY_*``) of environment variables that travel from where the command is given to every
    host, on top of those that change how a run computes. No other variable does, PATH included."""

    interface: Annotated[str, Field(pattern=_INTERFACE)] | None = None
    """Network interface over which hosts talk (gloo and NCCL); by default the one on the way to rank 0's host."""

    rendezvous_seconds: PositiveFloat = 300.0
    """How long ranks wait for each other when the run starts."""

    heartbeat_seconds: NonNegativeFloat = 20.0
    """A rank that gives no sign of life for this long (hung, stopped, cut off) ends the run on all hosts; 0: never,
    and a lost rank shows when a collective runs into ``parallel.timeout_minutes``."""

    preflight: PreflightConfig = PreflightConfig()
    """Examination of the hosts before training."""
