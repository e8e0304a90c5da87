"""The programs that compile kernels, found and checked before anything is built; problems come with a remedy."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.ops.building.problem import KernelsUnavailableError
from megatron_ext.runtime.environment import KernelEnvironment, find_program

_TIMEOUT_SECONDS = 60
_OLDEST_COMPILER = (9, 0)
_OLDEST_NVCC = (11, 8)


@dataclass(frozen=True)
class Tool:
    """A program and its version."""

    path: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class Torch:
    """An installation of torch, looked at without importing it."""

    folder: Path
    version: str
    cuda: str | None
    """CUDA version that it was built for, such as "13.0"; None of a CPU build."""

    @property
    def include(self) -> Path:
        """Folder of its headers."""
        return self.folder / "include"

    @property
    def libraries(self) -> Path:
        """Folder of its libraries."""
        return self.folder / "lib"

    @property
    def major(self) -> int:
        """Major version: the stable ABI changes with it alone."""
        return int(self.version.split(".")[0])


def find_torch() -> Torch:
    """The torch of this Python.

    Raises:
        KernelsUnavailableError: there is none, or it came without headers.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise KernelsUnavailableError("torch is not installed; pip install torch")
    folder = Path(spec.origin).parent
    text = (folder / "version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(__version__|cuda)\b[^=]*= '([^']+)'", text, flags=re.MULTILINE))
    found = Torch(folder, values["__version__"], values.get("cuda"))
    if not (found.include / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise KernelsUnavailableError(
            f"torch {found.version} has no headers of the stable ABI; pip install 'torch>=2.11'"
        )
    return found


def find_compiler(environment: KernelEnvironment) -> Tool:
    """The C++ compiler.

    Raises:
        KernelsUnavailableError: it is missing, does not run, or is too old for torch's headers.
    """
    path = shutil.which(environment.compiler)
    if path is None:
        raise KernelsUnavailableError(
            f"{environment.compiler} is not installed; install g++ (Debian, Ubuntu: apt install g++) or set CXX"
        )
    version = _version(_output([path, "-dumpfullversion", "-dumpversion"]), r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", path)
    if version < _OLDEST_COMPILER:
        raise KernelsUnavailableError(
            f"{path} {'.'.join(map(str, version))} is too old for torch's headers (C++17); install g++ "
            f"{_OLDEST_COMPILER[0]} or newer and set CXX to it"
        )
    return Tool(path, version)


def find_ninja() -> Tool:
    """The build program; the one of this Python's environment before the system's.

    Raises:
        KernelsUnavailableError: it is missing or does not run.
    """
    path = find_program("ninja")
    if path is None:
        raise KernelsUnavailableError("ninja is not installed; pip install ninja")
    return Tool(path, _version(_output([path, "--version"]), r"(\d+)\.(\d+)(?:\.(\d+))?", path))


def find_nvcc(environment: KernelEnvironment, torch: Torch) -> Tool:
    """The CUDA compiler.

    Raises:
        KernelsUnavailableError: it is missing, does not run, is too old, or is of another CUDA than torch's.
    """
    homes = [environment.cuda_home] if environment.cuda_home else []
    places = [home / "bin" / "nvcc" for home in [*homes, Path("/usr/local/cuda")]]
    path = next((str(place) for place in places[: len(homes)] if place.is_file()), None)
    path = path or shutil.which("nvcc") or (str(places[-1]) if places[-1].is_file() else None)
    if path is None:
        wanted = f"CUDA {torch.cuda} toolkit" if torch.cuda else "CUDA toolkit"
        raise KernelsUnavailableError(f"nvcc is not installed; install the {wanted} and set CUDA_HOME to it")
    version = _version(_output([path, "--version"]), r"release (\d+)\.(\d+)", path)
    shown = ".".join(map(str, version))
    if version < _OLDEST_NVCC:
        oldest = ".".join(map(str, _OLDEST_NVCC))
        raise KernelsUnavailableError(f"{path} {shown} is too old; install CUDA {oldest} or newer and set CUDA_HOME")
    if torch.cuda and int(torch.cuda.split(".")[0]) != version[0]:
        raise KernelsUnavailableError(
            f"{path} is of CUDA {shown} and torch {torch.version} of CUDA {torch.cuda}; install the CUDA "
            f"{torch.cuda.split('.')[0]} toolkit and set CUDA_HOME to it"
        )
    return Tool(path, version)


def nvcc_architectures(nvcc: Tool) -> frozenset[str]:
    """Architectures that nvcc compiles for, as "80", "90", "100"."""
    return frozenset(re.findall(r"compute_(\w+)", _output([nvcc.path, "--list-gpu-arch"])))


_ISA = re.compile(
    r"(sse|ssse|pni$|avx|fma|f16c|bmi|abm$|popcnt|cx16|movbe|aes|vaes|v?pclmul|adx|sha|gfni|rdrand|rdseed|xsave|amx"
    r"|clflushopt|clwb|fsgsbase|lahf_lm|prfchw|3dnowprefetch|pku|rdpid|asimd|fp|neon|sve|crc32|atomics)"
)


def cpu_features() -> frozenset[str]:
    """Instruction sets of this machine's CPU, by the kernel's names: what code compiled for it may use elsewhere."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(word for word in words.split() if _ISA.match(word))
    return frozenset()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"{command[0]} does not run ({error}); install it again") from error
    return done.stdout


def _version(text: str, pattern: str, path: str) -> tuple[int, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise KernelsUnavailableError(f"{path} says no version ({text.strip()[:80]!r}); install it again")
    return tuple(int(part) for part in match.groups() if part)
