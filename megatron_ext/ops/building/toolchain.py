"""What compiles the kernels here: torch's headers, compilers, the CPU's features, CUDA architectures. Imports no torch.

Everything is found and checked before anything is built; what is missing or unfit comes with a remedy.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import KernelEnvironment, find_program

_TIMEOUT_SECONDS = 60
_OLDEST_COMPILER = (9, 0)
_OLDEST_NVCC = (11, 8)
DEFAULT_ARCHITECTURES = ("80", "90", "100")
"""Compiled for where neither the environment nor a device says anything: A100, H100, B200."""


class KernelsUnavailableError(UserError):
    """Kernels cannot be built or loaded here: what is missing, and one line on what to do."""


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
    cuda: str | None  # CUDA version that it was built for, such as "13.0"; None of a CPU build

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"

    @property
    def major(self) -> int:
        """Major version: the stable ABI changes with it alone."""
        return int(self.version.split(".")[0])


def find_torch() -> Torch:
    """The torch of this Python. Raises KernelsUnavailableError if there is none, or it came without headers."""
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
    """The C++ compiler. Raises KernelsUnavailableError if it is missing, does not run, or is too old for torch."""
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
    """ninja, of this Python's environment before the system's. Raises KernelsUnavailableError if there is none."""
    path = find_program("ninja")
    if path is None:
        raise KernelsUnavailableError("ninja is not installed; pip install ninja")
    return Tool(path, _version(_output([path, "--version"]), r"(\d+)\.(\d+)(?:\.(\d+))?", path))


def find_nvcc(environment: KernelEnvironment, torch: Torch) -> Tool:
    """The CUDA compiler. Raises KernelsUnavailableError if it is missing, too old, or of another CUDA than torch's."""
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


@dataclass(frozen=True, order=True)
class Architecture:
    """One architecture, such as "90" or "90a"; ``ptx`` also keeps the form that later devices can compile."""

    name: str
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.name}+PTX" if self.ptx else self.name

    @property
    def options(self) -> list[str]:
        code = f"[sm_{self.name},compute_{self.name}]" if self.ptx else f"sm_{self.name}"
        return ["-gencode", f"arch=compute_{self.name},code={code}"]


def choose_architectures(
    listed: str | None, devices: Iterable[tuple[int, int]], known: Collection[str]
) -> tuple[Architecture, ...]:
    """What to compile for: ``listed``, else the devices, else DEFAULT_ARCHITECTURES as far as nvcc knows it.

    ``listed`` is TORCH_CUDA_ARCH_LIST where it is set, such as "8.0;9.0+PTX"; ``devices`` are the compute capabilities
    present, ``known`` is what nvcc compiles for. Raises KernelsUnavailableError if the list cannot be read, or nvcc
    does not know one of them.
    """
    if listed is not None:
        return _checked(_parsed(listed), known, "TORCH_CUDA_ARCH_LIST names")
    present = {Architecture(f"{major}{minor}") for major, minor in devices}
    if present:
        return _checked(sorted(present, key=_number), known, "this machine has")
    usable = [name for name in DEFAULT_ARCHITECTURES if name in known]
    if not usable:
        raise KernelsUnavailableError(
            f"nvcc knows none of {', '.join(DEFAULT_ARCHITECTURES)}; set TORCH_CUDA_ARCH_LIST"
        )
    # The newest as PTX too: devices that come later compile it when the kernels are loaded.
    return tuple(Architecture(name, ptx=name == usable[-1]) for name in usable)


def runs_on(compiled: Iterable[str], device: tuple[int, int]) -> bool:
    """Whether code for ``compiled`` (as ``str(Architecture)``) runs on a device of that compute capability.

    Machine code runs on devices of the same major and no lower minor version, and on no other where it is specific to
    one ("90a"); PTX on all that are not older.
    """
    major, minor = device
    for text in compiled:
        name, _, ptx = text.partition("+")
        number = int(name.rstrip("af"))
        if name.endswith("a"):
            if number == 10 * major + minor:
                return True
        elif (number // 10 == major and number % 10 <= minor) or (ptx and number <= 10 * major + minor):
            return True
    return False


def _parsed(text: str) -> list[Architecture]:
    result: dict[str, Architecture] = {}
    for word in re.split(r"[;,\s]+", text.strip(" ;,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if match is None:
            raise KernelsUnavailableError(
                f'TORCH_CUDA_ARCH_LIST has {word!r}; write compute capabilities, such as "8.0;9.0+PTX"'
            )
        name = match[1] + match[2]
        result[name] = Architecture(name, ptx=bool(match[3]) or (name in result and result[name].ptx))
    return sorted(result.values(), key=_number)


def _number(architecture: Architecture) -> tuple[int, str]:
    digits = architecture.name.rstrip("af")
    return int(digits), architecture.name


def _checked(wanted: Sequence[Architecture], known: Collection[str], source: str) -> tuple[Architecture, ...]:
    for architecture in wanted:
        if architecture.name.rstrip("af") not in known:
            have = ", ".join(sorted(known, key=lambda name: int(name.rstrip("af"))))
            raise KernelsUnavailableError(
                f"{source} {architecture.name} and this nvcc compiles for {have}; install another CUDA toolkit"
            )
    return tuple(wanted)
