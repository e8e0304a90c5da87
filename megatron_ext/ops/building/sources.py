"""Where the kernels' sources lie, and which files make which library."""

import hashlib
import os
import re
from pathlib import Path
from typing import Literal

import megatron_ext
from megatron_ext.ops.building.problem import KernelsUnavailableError

Backend = Literal["cpu", "cuda"]
CPU: Backend = "cpu"
CUDA: Backend = "cuda"
BACKENDS = (CPU, CUDA)

_PACKAGE = Path(megatron_ext.__file__).parent


def source_folder() -> Path:
    """The folder csrc: inside an installed package, or beside the package in a checkout.

    Raises:
        KernelsUnavailableError: neither has it.
    """
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


_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', flags=re.MULTILINE)


def _with_included(folder: Path, backend: Backend) -> set[Path]:
    """The translation units, and the files of ours that they include on a device or a CPU (not in the emulator)."""
    found: set[Path] = set()
    waiting = translation_units(folder, backend)
    while waiting:
        path = waiting.pop()
        if path not in found and path.parent != folder / "emulator":
            found.add(path)
            names = _INCLUDE.findall(path.read_text(encoding="utf-8"))
            waiting += [Path(os.path.normpath(path.parent / name)) for name in names]
    return found
