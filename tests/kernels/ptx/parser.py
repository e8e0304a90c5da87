"""Reads PTX: kernels with their parameters, registers, shared variables and instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Sizes of the types that a register, a parameter or an access may have, in bytes.
SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
SIZES |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", flags=re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", flags=re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+[^,]*?)?([\w$]+)(?:\[(\d+)\])?\s*$")
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", flags=re.DOTALL)
_LABEL = re.compile(r"\s*([$\w]+):(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", flags=re.DOTALL)


class PtxError(Exception):
    """The program cannot be read or run, or did something that is wrong on a device."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``parts`` are the pieces of the opcode; ``guard`` is (register, value that lets it run)."""

    place: int
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    text: str

    @property
    def type(self) -> str:
        return next(part for part in reversed(self.parts) if part in SIZES)


@dataclass(frozen=True)
class Variable:
    """Something in parameter or shared memory: bytes [offset, offset + size)."""

    offset: int
    size: int


@dataclass
class Kernel:
    """One entry of a module."""

    name: str
    parameters: dict[str, Variable] = field(default_factory=dict)
    parameter_bytes: int = 0
    shared: dict[str, Variable] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic_shared: str | None = None
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    max_threads: int = 1024

    def granule(self, space: str) -> int:
        """Size of the narrowest access to a space, at least 2: races are followed in units of it."""
        others = {"global", "shared", "param"} - {space}
        accesses = [each for each in self.instructions if each.parts[0] in {"ld", "st"}]
        sizes = [SIZES[each.type] for each in accesses if not others & set(each.parts)]
        return max(2, min(sizes, default=4))


def parse_module(text: str) -> dict[str, str]:
    """The text of each kernel of a module, by name: from ``.entry`` to the closing brace.

    Shared variables of the module (dynamic ones are declared there) are put before each kernel's own.
    """
    text = _COMMENT.sub(" ", text)
    kernels: dict[str, str] = {}
    outside: list[str] = []
    position = 0
    for entry in _ENTRY.finditer(text):
        if entry.start() < position:
            continue
        outside += re.findall(r"(?:\.extern\s+)?\.shared[^;]*;", text[position : entry.start()])
        end = _closing_brace(text, entry.end())
        kernels[entry[1]] = text[entry.start() : entry.end()] + "".join(outside) + text[entry.end() : end]
        position = end + 1
    return kernels


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise PtxError("a kernel without an end")


def parse_kernel(text: str) -> Kernel:
    """Reads one kernel of :func:`parse_module`."""
    entry = _ENTRY.match(text)
    assert entry is not None
    kernel = Kernel(name=entry[1])
    for parameter in filter(None, (each.strip() for each in entry[2].split(","))):
        _add_parameter(kernel, parameter)
    limits = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3])
    if limits is not None:
        kernel.max_threads = int(limits[1]) * int(limits[2] or 1) * int(limits[3] or 1)
    for statement in _statements(kernel, text[entry.end() :]):
        _add_statement(kernel, statement)
    return kernel


def _statements(kernel: Kernel, body: str) -> Iterator[str]:
    """Statements in order, without braces of scopes; labels are noted where they stand."""
    for piece in body.split(";"):
        statement = piece.lstrip(" \t\n{}")
        while (label := _LABEL.match(statement)) is not None:
            kernel.labels[label[1]] = len(kernel.instructions)
            statement = statement[label.end() :].lstrip(" \t\n{}")
        if statement.strip():
            yield " ".join(statement.split())


def _add_parameter(kernel: Kernel, text: str) -> None:
    match = _PARAMETER.match(text)
    if match is None:
        raise PtxError(f"parameter {text!r}")
    size = SIZES[match[2]] * int(match[4] or 1)
    alignment = int(match[1] or SIZES[match[2]])
    offset = -(-kernel.parameter_bytes // alignment) * alignment
    kernel.parameters[match[3]] = Variable(offset, size)
    kernel.parameter_bytes = offset + size


def _add_statement(kernel: Kernel, statement: str) -> None:
    if statement.startswith((".pragma", ".loc", ".file")):
        return
    if (registers := _REGISTERS.match(statement)) is not None:
        for name in registers[2].split(","):
            many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            kernel.registers.update(dict.fromkeys(names, registers[1]))
        return
    if (shared := _SHARED.match(statement)) is not None:
        _add_shared(kernel, shared)
        return
    if statement.startswith("."):
        raise PtxError(f"{kernel.name}: {statement!r} is not interpreted")
    match = _INSTRUCTION.fullmatch(statement)
    assert match is not None, statement
    guard = (match[2], not match[1]) if match[2] else None
    operands = tuple(each.strip() for each in re.split(r",(?![^{\[]*[}\]])", match[4]) if each.strip())
    place = len(kernel.instructions)
    kernel.instructions.append(Instruction(place, tuple(match[3].split(".")), operands, guard, statement))


def _add_shared(kernel: Kernel, match: re.Match[str]) -> None:
    if match[1]:
        kernel.dynamic_shared = match[4]
        return
    alignment, size = int(match[2]), SIZES[match[3]] * int(match[5] or 1)
    offset = -(-kernel.shared_bytes // alignment) * alignment
    kernel.shared[match[4]] = Variable(offset, size)
    kernel.shared_bytes = offset + size
