"""Values of registers, numpy arrays with one element for each thread: operands, arithmetic, conversions (``cvt``).

Approximate instructions are computed exactly and then made wrong by as much as the ISA allows, up or down by a hash of
the argument, so that a kernel's accuracy does not rest on more than the device promises.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.kernels.ptx.parser import SIZES, Kernel, PtxError

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
    return -(-kernel.shared_bytes // 16) * 16


def _special(registers: Registers, name: str) -> Array:
    try:
        return registers.special[name]
    except KeyError:
        raise PtxError(f"special register {name}") from None


Operation = Callable[..., Array]

# Relative errors that the PTX ISA allows, or a little more.
RELATIVE_ERRORS = {
    "ex2": 2.0**-22,
    "rsqrt": 2.0**-22.9,
    "rcp": 2.0**-23,
    "sqrt": 2.0**-23,
    "div": 2.0**-22,
}

_EXACT: dict[str, Operation] = {
    "ex2": np.exp2,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "div": lambda a, b: a / b,
}

_BINARY: dict[str, Operation] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.fmin,
    "max": np.fmax,
}

_COMPARISONS: dict[str, Operation] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def flush(value: Array) -> Array:
    """Subnormal float32 numbers become zeros of their sign (``.ftz``)."""
    tiny = np.abs(value) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), value), value) if value.dtype == np.float32 else value


def approximate(name: str, *arguments: Array) -> Array:
    """The result of an approximate float32 instruction, wrong by its largest allowed error."""
    exact = _EXACT[name](*(each.astype(np.float64) for each in arguments))
    rounded = exact.astype(np.float32)
    inexact = np.isfinite(exact) & (rounded.astype(np.float64) != exact)
    bits = arguments[0].view(np.uint32) * np.uint32(2654435761)
    sign = np.where((bits >> np.uint32(16)) & np.uint32(1), 1.0, -1.0)
    wrong = (exact * (1 + sign * RELATIVE_ERRORS[name])).astype(np.float32)
    return np.where(inexact, wrong, rounded)


def function_of(parts: tuple[str, ...], dtype: np.dtype[Any]) -> Operation:
    """The function of an opcode with one result and operands of one type."""
    name = parts[0]
    if "approx" in parts or (name == "div" and "full" in parts):
        return _with_flush(parts, lambda *a: approximate(name, *a))
    if name in _EXACT and "rn" in parts:
        return _with_flush(parts, lambda *a: _EXACT[name](*(x.astype(np.float64) for x in a)).astype(dtype))
    if name in _BINARY and "NaN" not in parts:
        return _with_flush(parts, _BINARY[name])
    if name in _OTHER:
        return _with_flush(parts, _OTHER[name](parts, dtype))
    raise PtxError(f"no {'.'.join(parts)}")


def _with_flush(parts: tuple[str, ...], function: Operation) -> Operation:
    if "sat" in parts:
        raise PtxError(f"no {'.'.join(parts)}")
    if "ftz" not in parts:
        return function
    return lambda *a: flush(function(*(flush(x) for x in a)))


def _multiply(parts: tuple[str, ...], _dtype: np.dtype[Any]) -> Operation:
    if "hi" in parts:
        raise PtxError(f"no {'.'.join(parts)}")
    return np.multiply


def _multiply_add(parts: tuple[str, ...], dtype: np.dtype[Any]) -> Operation:
    if dtype == np.float32:
        # The product of two float32 is exact in float64.
        return lambda a, b, c: np.asarray((a.astype(np.float64) * b.astype(np.float64) + c).astype(np.float32))
    multiply = _multiply(parts, dtype)
    return lambda a, b, c: np.asarray(multiply(a, b) + c)


def _divide(_parts: tuple[str, ...], dtype: np.dtype[Any]) -> Operation:
    if dtype.kind != "i":
        return np.floor_divide if dtype.kind == "u" else np.divide

    def toward_zero(a: Array, b: Array) -> Array:
        quotient = a // b
        return np.asarray(quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(dtype))

    return toward_zero


def _shift(parts: tuple[str, ...], dtype: np.dtype[Any]) -> Operation:
    bits = 8 * dtype.itemsize
    left = parts[0] == "shl"

    def shift(value: Array, count: Array) -> Array:
        inside = np.minimum(count, np.uint32(bits - 1)).astype(dtype)
        shifted = np.asarray(value << inside if left else value >> inside)
        if not left and dtype.kind == "i":
            return shifted
        return np.where(count < bits, shifted, dtype.type(0))

    return shift


_OTHER: dict[str, Callable[[tuple[str, ...], np.dtype[Any]], Operation]] = {
    "mul": _multiply,
    "fma": _multiply_add,
    "mad": _multiply_add,
    "div": _divide,
    "rem": lambda _parts, _dtype: np.fmod,
    "shl": _shift,
    "shr": _shift,
    "neg": lambda _parts, _dtype: np.negative,
    "abs": lambda _parts, _dtype: np.abs,
    "not": lambda _parts, _dtype: np.invert,
    "copysign": lambda _parts, _dtype: lambda sign, value: np.copysign(value, sign),
}


def comparison(name: str, dtype: np.dtype[Any]) -> Operation:
    """What ``setp.NAME`` asks. Names that end in u are also true where an operand is NaN."""
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if dtype.kind != "f":
        return _COMPARISONS[name]
    ordered = _COMPARISONS[name[:2]]
    or_nan = name.endswith("u")
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), or_nan, ordered(a, b))


def bfloat16_to_float(bits: Array) -> Array:
    return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bfloat16(value: Array) -> Array:
    """Rounded to nearest, ties to even; NaN is 0x7fff, as on the device."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded.astype(np.uint16))


def float_to_half(value: Array) -> Array:
    """Rounded to nearest, ties to even; NaN is 0x7fff, as on the device."""
    return np.where(np.isnan(value), np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16)).view(np.float16)


def conversion(parts: tuple[str, ...]) -> tuple[str, str, Callable[..., Array]]:
    """Types of result and operand of a ``cvt``, and its function."""
    to, source = (part for part in parts if part in SIZES)
    if source == "bf16" and to == "f32":
        return to, "b16", bfloat16_to_float
    target: np.dtype[Any] = TYPES[to]
    if to in {"bf16", "f16"} and source == "f32" and "rn" in parts:
        return to, source, float_to_bfloat16 if to == "bf16" else float_to_half
    to_integer = target.kind != "f" and TYPES[source].kind == "f"
    if "bf16" in {to, source} or to == "f16" or to_integer or {"sat", "rni", "rzi", "rmi", "rpi"} & set(parts):
        raise PtxError(f"no {'.'.join(parts)}")
    return to, source, lambda value: value.astype(target)
