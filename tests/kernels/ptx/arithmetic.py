"""Arithmetic, logic, comparisons and selections, each as a function of arrays.

Approximate instructions are computed exactly and then made wrong by as much as the ISA allows, up or down by a hash of
the argument, so that a kernel's accuracy does not rest on more than the device promises.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.parser import PtxError
from tests.kernels.ptx.values import Array

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
