"""Which CUDA architectures kernels are compiled for, and nvcc's options for them."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from megatron_ext.ops.building.problem import KernelsUnavailableError

DEFAULT = ("80", "90", "100")
"""Where neither the environment nor a device says anything: A100, H100, B200."""


@dataclass(frozen=True, order=True)
class Architecture:
    """One architecture, such as "90" or "90a"; ``ptx`` also keeps the form that later devices can compile."""

    name: str
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.name}+PTX" if self.ptx else self.name

    @property
    def options(self) -> list[str]:
        """nvcc's options."""
        code = f"[sm_{self.name},compute_{self.name}]" if self.ptx else f"sm_{self.name}"
        return ["-gencode", f"arch=compute_{self.name},code={code}"]


def choose_architectures(
    listed: str | None, devices: Iterable[tuple[int, int]], known: Collection[str]
) -> tuple[Architecture, ...]:
    """What to compile for: ``listed``, else the devices, else DEFAULT as far as nvcc knows it.

    Args:
        listed: Content of TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX"; None where it is not set.
        devices: Compute capabilities of the devices present.
        known: What nvcc compiles for.

    Raises:
        KernelsUnavailableError: the list cannot be read, or nvcc does not know one of them.
    """
    if listed is not None:
        return _checked(_parsed(listed), known, "TORCH_CUDA_ARCH_LIST names")
    present = {Architecture(f"{major}{minor}") for major, minor in devices}
    if present:
        return _checked(sorted(present, key=_number), known, "this machine has")
    usable = [name for name in DEFAULT if name in known]
    if not usable:
        raise KernelsUnavailableError(f"nvcc knows none of {', '.join(DEFAULT)}; set TORCH_CUDA_ARCH_LIST")
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
