"""What the environment says about building kernels: where they are kept, with which compilers, for which devices."""

import os
from dataclasses import dataclass
from pathlib import Path

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
