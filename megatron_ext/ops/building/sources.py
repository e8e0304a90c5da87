"""Where the kernels' sources lie, and which files make which library."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import megatron_ext
from megatron_ext.ops.building.problem import KernelsUnavailableError

Backend = Literal["cpu", "cuda"]
BACKENDS: tuple[Backend, ...] = ("cpu", "cuda")

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
    """SHA-256 (hex) of every file that a library is made of, headers too, by name and content."""
    parts = ("common", "bindings", backend)
    return _digest_of(folder, (path for part in parts for path in (folder / part).rglob("*")))


def _digest_of(folder: Path, paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            content = path.read_bytes()
            total.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()
