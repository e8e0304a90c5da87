"""What a test knows of a machine that runs kernels: its memory, and the functions of csrc/common/abi.h.

A test takes the fixture ``backend``, copies its inputs with ``backend.tensor``, makes its outputs with
``backend.empty`` (NaN bytes, so that what a kernel leaves out is seen), and calls a function.
"""

import ctypes
import mmap
import re
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

Argument = torch.Tensor | int | float | None
STREAM = 0
ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc" / "common" / "abi.h"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# What a pointer of each type may point to; void: any.
POINTED_TO: dict[str, frozenset[torch.dtype]] = {
    "void": frozenset(),
    "float": frozenset({torch.float32}),
    "double": frozenset({torch.float64}),
    "int64_t": frozenset({torch.int64}),
}

PAGE = mmap.PAGESIZE
POISON = 0xFF  # NaN in every float type, -1 in integers

_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class KernelError(Exception):
    """A kernel was refused (``status``, as abi.h has it) or did something that is wrong (``report``)."""

    def __init__(self, function: str, status: int, report: str = "") -> None:
        super().__init__(f"{function}: {report or f'status {status}'}")
        self.status = status
        self.report = report


class KernelBackend(Protocol):
    """A machine, or one way to run it."""

    @property
    def name(self) -> str:
        """The name that the fixture's parameter has."""
        ...

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        """A copy in the backend's memory.

        It starts at a multiple of ``alignment`` bytes; where that is the element size it ends at an unreadable page (a
        device has none). Nothing behind or before it may be touched.
        """
        ...

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """The same, filled with NaN bytes."""
        ...

    def call(self, function: str, *arguments: Argument) -> None:
        """Calls ``function`` of abi.h, without its last argument; raises ``KernelError``."""
        ...

    def partitions(self, rows: int, cols: int) -> int:
        """How many partial column sums the workspace of a backward pass is to hold."""
        ...


class _Mapping(mmap.mmap):
    """A mapping that can be weakly referred to."""


class GuardedMemory:
    """Gives out tensors between guard pages, and knows them for as long as they live: who touches more is seen.

    A tensor ends at the page behind it, or less than 16 bytes before, so that it begins at a multiple of 16 as every
    tensor of torch does. What lies between is filled with NaN bytes and must not change.
    """

    def __init__(self) -> None:
        self._mappings: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()
        self._sizes: dict[int, int] = {}

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """A tensor of NaN bytes. ``alignment`` of its start, in bytes: its element size lets it end at the page."""
        size = torch.Size(shape).numel() * dtype.itemsize
        pages = max(1, -(-(size + alignment - 1) // PAGE))
        mapping = _Mapping(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        mapping[PAGE : (pages + 1) * PAGE] = bytes([POISON]) * (pages * PAGE)
        for guard in (base, base + (pages + 1) * PAGE):
            if _LIBC.mprotect(guard, PAGE, _PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        start = ((pages + 1) * PAGE - size) // alignment * alignment
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(mapping, dtype=dtype, count=size // dtype.itemsize, offset=start)
        address = flat.data_ptr()
        assert address == base + start
        self._mappings[address] = mapping
        self._sizes[address] = size
        return flat.view(shape)

    def copy(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        return self.empty(*value.shape, dtype=value.dtype, alignment=alignment).copy_(value)

    def region(self, tensor: torch.Tensor) -> tuple[int, int, int, int]:
        """Addresses of a tensor's memory: mapping, data, end of data, end of mapping; a view is given its base's."""
        address = tensor.untyped_storage().data_ptr()
        mapping = self._mappings.get(address)
        if mapping is None:
            start = tensor.data_ptr()
            return start, start, start + tensor.nbytes, start + tensor.nbytes
        begin = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        return begin, address, address + self._sizes[address], begin + len(mapping)

    def damaged(self, tensor: torch.Tensor) -> bool:
        """True where bytes between the tensor and its guard pages were written."""
        begin, data, data_end, end = self.region(tensor)
        if begin == data:
            return False
        before = ctypes.string_at(begin + PAGE, data - begin - PAGE)
        behind = ctypes.string_at(data_end, end - PAGE - data_end)
        return before.count(POISON) != len(before) or behind.count(POISON) != len(behind)


@dataclass(frozen=True)
class Guarded:
    """What the backends share that work in this process's memory."""

    name: str
    memory: GuardedMemory

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        """A copy of ``value`` in guarded memory."""
        return self.memory.copy(value, alignment=alignment)

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """The same, filled with NaN bytes."""
        return self.memory.empty(*shape, dtype=dtype, alignment=alignment)


def check_canaries(memory: GuardedMemory, function: str, arguments: tuple[Argument, ...]) -> None:
    """Raises ``KernelError`` where memory beside a tensor was written."""
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and memory.damaged(argument):
            raise KernelError(function, 0, f"memory beside argument {place} was written")


@dataclass(frozen=True)
class Parameter:
    """One parameter: ``base`` is the type without const and ``*``."""

    name: str
    base: str
    pointer: bool


@cache
def functions() -> dict[str, tuple[Parameter, ...]]:
    """Parameters of each declared function, without the stream or the executor, which every backend adds."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text(encoding="utf-8"))
    text = re.sub(r"#define MX_DECLARE.*?\n(?=\n)", "", text, flags=re.DOTALL)
    found = re.findall(r"MX_DECLARE\((\w+),(.*?)\);", text, flags=re.DOTALL)
    return {name: tuple(_parameter(each) for each in parameters.split(",")) for name, parameters in found}


def _parameter(text: str) -> Parameter:
    match = re.fullmatch(r"\s*(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)\s*", text)
    assert match is not None, text
    return Parameter(name=match[3], base=match[1], pointer=bool(match[2]))


def addresses(function: str, arguments: tuple[torch.Tensor | int | float | None, ...]) -> list[int | float]:
    """``arguments`` of ``function`` as the C function takes them; a mistake of the test is an ``AssertionError``."""
    parameters = functions()[function]
    assert len(arguments) == len(parameters), f"{function} takes {[each.name for each in parameters]}"
    return [_address(function, *pair) for pair in zip(parameters, arguments, strict=True)]


def _address(function: str, parameter: Parameter, argument: torch.Tensor | int | float | None) -> int | float:
    what = f"{function}: {parameter.name}"
    if not parameter.pointer:
        assert isinstance(argument, int | float), f"{what} is a number"
        return float(argument) if parameter.base in {"float", "double"} else int(argument)
    if argument is None:
        return 0
    assert isinstance(argument, torch.Tensor), f"{what} is a tensor or None"
    assert argument.is_contiguous(), f"{what} must be contiguous"
    allowed = POINTED_TO[parameter.base]
    assert not allowed or argument.dtype in allowed, f"{what} points to {parameter.base}, not {argument.dtype}"
    return argument.data_ptr()
