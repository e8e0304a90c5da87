"""Conversions between types (``cvt``), rounded once."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.parser import SIZES, PtxError
from tests.kernels.ptx.values import TYPES, Array

_TO_INTEGER: dict[str, Callable[..., Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def bfloat16_to_float(bits: Array) -> Array:
    """The float32 that a bfloat16 is."""
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
    """Types of result and operand of a ``cvt``, and its function; the packed forms take two operands."""
    if "f16x2" in parts or "bf16x2" in parts:
        narrow = float_to_half if "f16x2" in parts else float_to_bfloat16
        return "b32", "f32", lambda high, low: _pack(narrow(high), narrow(low))
    types = [part for part in parts if part in SIZES]
    to, source = types[-2], types[-1]
    function = _rounding(parts, to, source)
    if source == "bf16":
        inner = function
        return to, "b16", lambda value: inner(bfloat16_to_float(value))
    return to, source, function


def _pack(high: Array, low: Array) -> Array:
    return (high.view(np.uint16).astype(np.uint32) << np.uint32(16)) | low.view(np.uint16).astype(np.uint32)


def _rounding(parts: tuple[str, ...], to: str, source: str) -> Callable[[Array], Array]:
    target: np.dtype[Any] = TYPES[to]
    from_float = source in {"f16", "bf16", "f32", "f64"}
    if to in {"bf16", "f16"} and from_float:
        if source == "f64" or "rn" not in parts:
            raise PtxError(f"no {'.'.join(parts)}")
        return float_to_bfloat16 if to == "bf16" else float_to_half
    if target.kind == "f":
        integral = [_TO_INTEGER[part] for part in parts if part in _TO_INTEGER]
        return lambda value: integral[0](value).astype(target) if integral else value.astype(target)
    if from_float:
        round_to = next(_TO_INTEGER[part] for part in parts if part in _TO_INTEGER)
        limits = np.iinfo(target)
        # Out of range: the nearest integer of the type; NaN: 0.
        return lambda value: np.where(
            np.isnan(value), 0, np.clip(round_to(value.astype(np.float64)), limits.min, limits.max)
        ).astype(target)
    if "sat" in parts:
        raise PtxError(f"no {'.'.join(parts)}")
    return lambda value: value.astype(target)
