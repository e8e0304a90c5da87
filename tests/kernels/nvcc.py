"""What nvcc makes of the kernels: PTX, device code with ptxas's report, and the library that a GPU runs."""

import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron_ext.ops.building.recipe import NVCC_FLAGS
from tests.kernels.building import SOURCES, CannotBuildError, Step, make, tool, version_of

# Those of the build, but for the line numbers, which change no instruction.
FLAGS = " ".join(flag for flag in NVCC_FLAGS if flag != "-lineinfo")


def kernel_sources(root: Path = SOURCES) -> list[Path]:
    """The CUDA sources."""
    sources = sorted((root / "cuda").glob("*.cu"))
    if not sources:
        raise CannotBuildError("there are no kernels in csrc/cuda")
    return sources


@cache
def newest_architecture() -> int:
    """The newest architecture that nvcc can compile for."""
    done = subprocess.run([tool("nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return max(int(number) for number in re.findall(r"compute_(\d+)", done.stdout))


def ptx_of(sources: Sequence[Path], architecture: int) -> list[Path]:
    """PTX of each source for ``compute_ARCHITECTURE``."""
    command = f"{tool('nvcc')} {FLAGS} -ptx -arch=compute_{architecture} $in -o $out"
    return make([Step(command, (source,), ".ptx", version_of("nvcc")) for source in sources])


def device_code_of(sources: Sequence[Path], architecture: int) -> list[Path]:
    """Device code of each source for ``sm_ARCHITECTURE``, from its PTX; ptxas's report lies beside it (``.log``)."""
    command = f"{tool('ptxas')} -v -arch=sm_{architecture} $in -o $out > $log 2>&1"
    return make([Step(command, (ptx,), ".cubin", version_of("ptxas")) for ptx in ptx_of(sources, architecture)])


def device_library(sources: Sequence[Path]) -> Path:
    """The kernels' C interface for the devices of this machine."""
    compile_one = f"{tool('nvcc')} {FLAGS} -arch=native -c $in -o $out"
    objects = make([Step(compile_one, (source,), ".o", version_of("nvcc")) for source in sources])
    link = f"{tool('nvcc')} -shared -cudart static $in -o $out"
    return make([Step(link, tuple(objects), ".so", version_of("nvcc"))])[0]
