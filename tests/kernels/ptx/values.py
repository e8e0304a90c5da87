"""Values of registers: numpy arrays with one element for each thread, and operands that read and write them."""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.parser import Kernel, PtxError

Array = npt.NDArray[Any]
# Threads that take part in an instruction: their numbers, or all of them.
Lanes = npt.NDArray[np.int64] | slice
ALL = slice(None)

TYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1",
        "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
        "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    }.items()
}  # fmt: skip


@dataclass
class Registers:
    """Registers of a batch of threads, by name; an array has the type that was last written, and one name."""

    threads: int
    arrays: dict[str, Array] = field(default_factory=dict)
    special: dict[str, Array] = field(default_factory=dict)

    def read(self, name: str, dtype: np.dtype[Any], lanes: Lanes) -> Array:
        array = self.arrays.get(name)
        if array is None:
            array = self.arrays[name] = self._undefined(dtype)
        if array.dtype != dtype:
            array = _as_type(array, dtype)
        return array[lanes]

    def write(self, name: str, value: Array, lanes: Lanes) -> None:
        if lanes is ALL:
            self.arrays[name] = value if value.shape == (self.threads,) else np.full(self.threads, value, value.dtype)
            return
        array = self.arrays.get(name)
        if array is None:
            array = self._undefined(value.dtype)
        elif array.dtype != value.dtype:
            array = _as_type(array, value.dtype)
        array[lanes] = value
        self.arrays[name] = array

    def _undefined(self, dtype: np.dtype[Any]) -> Array:
        """What a register holds before anything was written to it: NaN, or -1."""
        return np.frombuffer(b"\xff" * (self.threads * dtype.itemsize), dtype).copy()


def _as_type(array: Array, dtype: np.dtype[Any]) -> Array:
    """The same bits; a narrower type takes the low ones, as `st.u8` of a 16-bit register does."""
    if array.dtype.itemsize == dtype.itemsize:
        return array.view(dtype)
    unsigned = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    return unsigned.astype(np.dtype(f"u{dtype.itemsize}")).view(dtype)


Read = Callable[[Registers, Lanes], Array]


def literal(text: str, type_name: str) -> Array | None:
    """A number as PTX writes it, as an array of one element; None where ``text`` is none."""
    if (single := re.fullmatch(r"(-?)0[fF]([0-9a-fA-F]{8})", text)) is not None:
        value = np.array([struct.unpack(">f", bytes.fromhex(single[2]))[0]], np.float32)
        return -value if single[1] else value
    if (double := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text)) is not None:
        return np.array([struct.unpack(">d", bytes.fromhex(double[1]))[0]], np.float64)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) is None:
        return None
    number = int(text.removesuffix("U"), 0)
    dtype = TYPES[type_name]
    if dtype.kind == "b":
        return np.array([number != 0])
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.array([number % (1 << 8 * dtype.itemsize)], np.uint64).astype(unsigned).view(dtype)


def reader(kernel: Kernel, operand: str, type_name: str) -> Read:
    """What reads ``operand`` as ``type_name``: a register, a special one, a number, or an address of a variable."""
    dtype = TYPES[type_name]
    if operand.startswith("!"):
        inner = reader(kernel, operand[1:], type_name)
        return lambda registers, lanes: ~inner(registers, lanes)
    if operand in kernel.registers:
        return lambda registers, lanes: registers.read(operand, dtype, lanes)
    number = literal(operand, type_name)
    if number is not None:
        return lambda _registers, _lanes: number
    if operand in kernel.shared or operand in kernel.parameters or operand == kernel.dynamic_shared:
        address = np.array([address_of(kernel, operand)], dtype)
        return lambda _registers, _lanes: address
    if operand.startswith("%") or operand == "WARP_SZ":
        return lambda registers, lanes: _special(registers, operand)[lanes].astype(dtype)
    raise PtxError(f"{kernel.name}: operand {operand!r}")


def address_of(kernel: Kernel, name: str) -> int:
    """A variable's place in its own space; dynamic shared memory begins behind the static variables."""
    if name == kernel.dynamic_shared:
        return dynamic_start(kernel)
    return (kernel.shared if name in kernel.shared else kernel.parameters)[name].offset


def dynamic_start(kernel: Kernel) -> int:
    """Where dynamic shared memory begins."""
    return -(-kernel.shared_bytes // 16) * 16


def _special(registers: Registers, name: str) -> Array:
    try:
        return registers.special[name]
    except KeyError:
        raise PtxError(f"special register {name}") from None
