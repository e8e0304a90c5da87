"""Conversions between types (``cvt``), rounded once."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.parser import SIZES, PtxError
from tests.kernels.ptx.values import TYPES, Array


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
