"""How one library is built: files, compilers, options, the ninja file that says so, and the key of the result."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import megatron_ext
from megatron_ext.ops.building.toolchain import (
    Architecture,
    KernelsUnavailableError,
    Tool,
    Torch,
    choose_architectures,
    cpu_features,
    find_compiler,
    find_ninja,
    find_nvcc,
    find_torch,
    nvcc_architectures,
)
from megatron_ext.runtime.environment import KernelEnvironment

Backend = Literal["cpu", "cuda"]
CPU: Backend = "cpu"
CUDA: Backend = "cuda"
BACKENDS = (CPU, CUDA)

_PACKAGE = Path(megatron_ext.__file__).parent
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', flags=re.MULTILINE)

TORCH_TARGET = "0x020b000000000000"
"""The oldest torch whose stable ABI the libraries ask for: 2.11, the lowest that the package allows."""

KERNEL_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-Wall", "-Wextra")
"""Of csrc/cpu."""

# The operators' functions have the same names in both libraries and must not be mixed up by the loader.
BINDING_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-fvisibility-inlines-hidden")

NVCC_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-Wall")
"""Of csrc/cuda."""


def source_folder() -> Path:
    """The folder csrc, of the package or beside it. Raises KernelsUnavailableError if there is none."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "common" / "abi.h").is_file():
            return folder
    raise KernelsUnavailableError(f"the kernels' sources are not beside {_PACKAGE}; install the package again")


def prebuilt_folder() -> Path:
    """Where an installation puts what it compiled ahead of time; need not exist."""
    return _PACKAGE / "ops" / "prebuilt"


def translation_units(folder: Path, backend: Backend) -> list[Path]:
    """Files of ``folder`` that are compiled for a backend, in the order in which they are linked.

    The operators' schemas are in the CPU library alone: it is loaded first, on every machine.
    """
    own = sorted((folder / backend).glob("*.cpp" if backend == "cpu" else "*.cu"))
    bindings = ["schema.cpp", "cpu.cpp"] if backend == "cpu" else ["cuda.cpp"]
    return own + [folder / "bindings" / name for name in bindings]


def digest(folder: Path, backend: Backend) -> str:
    """SHA-256 (hex) of every file that a library is made of, by name and content: its sources and what they include."""
    total = hashlib.sha256()
    for path in sorted(_with_included(folder, backend)):
        content = path.read_bytes()
        total.update(f"{os.path.relpath(path, folder)} {len(content)}\n".encode() + content)
    return total.hexdigest()


def _with_included(folder: Path, backend: Backend) -> set[Path]:
    """The translation units, and the files of ours that they include."""
    found: set[Path] = set()
    waiting = translation_units(folder, backend)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = _INCLUDE.findall(path.read_text(encoding="utf-8"))
            waiting += [Path(os.path.normpath(path.parent / name)) for name in names]
    return found


@dataclass(frozen=True)
class Recipe:
    """A library that can be built here."""

    backend: Backend
    folder: Path  # csrc
    torch: Torch
    compiler: Tool
    ninja: Tool
    nvcc: Tool | None
    architectures: tuple[Architecture, ...]
    sources: str  # digest of the files
    features: frozenset[str]  # instruction sets that the result may use

    @property
    def file(self) -> str:
        return f"libmegatron_ext_{self.backend}.so"

    @property
    def key(self) -> str:
        """Name of the result: another one where files, options, compilers, CPU or torch's ABI differ."""
        content = {**self.metadata(), "flags": [KERNEL_FLAGS, BINDING_FLAGS, NVCC_FLAGS, TORCH_TARGET]}
        return f"{self.backend}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]}"

    def metadata(self) -> dict[str, object]:
        """What is written beside the library: for people, and to tell whether it fits another machine."""
        return {
            "backend": self.backend,
            "sources": self.sources,
            "compiler": str(self.compiler),
            "nvcc": None if self.nvcc is None else str(self.nvcc),
            "architectures": [str(architecture) for architecture in self.architectures],
            "features": sorted(self.features),
            "machine": platform.machine(),
            "torch_major": self.torch.major,
        }

    def ninja_file(self) -> str:
        """The build of ``file`` in the current folder."""
        units = translation_units(self.folder, self.backend)
        torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", _quoted(self.torch.include)]
        lines = [
            "ninja_required_version = 1.3",
            _rule("binding", [_quoted(self.compiler.path), *BINDING_FLAGS, *torch_flags, *self._cuda_include()]),
            _rule("kernel", [_quoted(self.compiler.path), *KERNEL_FLAGS]),
        ]
        if self.nvcc:
            architectures = [option for architecture in self.architectures for option in architecture.options]
            host = ["-ccbin", _quoted(self.compiler.path)]
            lines.append(_rule("device", [_quoted(self.nvcc.path), *NVCC_FLAGS, *host, *architectures]))
        objects = []
        for unit in units:
            rule = "binding" if unit.parent.name == "bindings" else "device" if unit.suffix == ".cu" else "kernel"
            objects.append(f"{unit.parent.name}-{unit.stem}.o")
            lines.append(f"build {objects[-1]}: {rule} {_path(unit)}")
        lines += [self._link_rule(), f"build {self.file}: link {' '.join(objects)}", f"default {self.file}", ""]
        return "\n".join(lines)

    def _cuda_include(self) -> list[str]:
        if self.nvcc is None:
            return []
        home = Path(self.nvcc.path).resolve().parent.parent
        places = [home / "include", *home.glob("targets/*/include"), Path("/usr/local/cuda/include")]
        found = next((place for place in places if (place / "cuda_runtime_api.h").is_file()), places[0])
        return ["-isystem", _quoted(found)]

    def _link_rule(self) -> str:
        # torch's libraries are loaded already when this one is: no path to them is kept. libtorch needs libtorch_cuda
        # in a CUDA build, which has the one symbol that is weak here.
        options = ["--no-undefined", "-Bsymbolic", "--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if self.nvcc is None:
            command = [
                _quoted(self.compiler.path),
                "-shared",
                "$in",
                "-o",
                "$out",
                f"-L{_quoted(self.torch.libraries)}",
            ]
            return _command("link", [*command, *(o if o.startswith("-l") else f"-Wl,{o}" for o in options)])
        command = [_quoted(self.nvcc.path), "-shared", "-cudart", "static", "-ccbin", _quoted(self.compiler.path)]
        command += ["$in", "-o", "$out", f"-L{_quoted(self.torch.libraries)}"]
        return _command("link", [*command, *(word for option in options for word in ("-Xlinker", option))])


def recipe_for(backend: Backend, environment: KernelEnvironment, devices: Iterable[tuple[int, int]] = ()) -> Recipe:
    """How ``backend`` is built for ``devices`` (compute capabilities). Raises KernelsUnavailableError if it is not."""
    folder, torch, compiler, ninja = source_folder(), find_torch(), find_compiler(environment), find_ninja()
    nvcc, architectures = None, tuple[Architecture, ...]()
    if backend == "cuda":
        nvcc = find_nvcc(environment, torch)
        architectures = choose_architectures(environment.architectures, devices, nvcc_architectures(nvcc))
    return Recipe(
        backend=backend,
        folder=folder,
        torch=torch,
        compiler=compiler,
        ninja=ninja,
        nvcc=nvcc,
        architectures=architectures,
        sources=digest(folder, backend),
        # Device code and its bindings run on any CPU of the kind.
        features=cpu_features() if backend == "cpu" else frozenset(),
    )


def _rule(name: str, words: Iterable[str]) -> str:
    return _command(name, [*words, "-c", "$in", "-o", "$out"])


def _command(name: str, words: Iterable[str]) -> str:
    return f"rule {name}\n  command = {' '.join(words)}\n  description = {name} $out"


def _quoted(path: Path | str) -> str:
    """A path inside a command of a ninja file, which a shell runs."""
    return "'" + str(path).replace("$", "$$").replace("'", "'\\''") + "'"


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
