"""The kernels' C interface as csrc/common/abi.h declares it, read from the header itself."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

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
