"""Reads ptxas's report and nvdisasm's listing of kernels; and the table of what each may take, beside this file."""

import json
import re
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tests.kernels.building import (
    CannotBuildError,
    Step,
    device_code_of,
    kernel_sources,
    make,
    newest_architecture,
    tool,
)

# What the library is built for where nobody says otherwise; the newest one stands for what is to come.
ARCHITECTURES = ("80", "90", "100", "newest")

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", flags=re.MULTILINE)
_GLOBAL_ACCESS = re.compile(r"\b((?:LDG|STG)\.E[.\w]*)")
_LOCAL_ACCESS = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Resources:
    """What ptxas says a kernel takes; ``stack`` and ``spilled`` in bytes."""

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Accesses:
    """Memory instructions of a kernel: whether it reads and writes 16 bytes at once, and those to local memory."""

    wide_loads: int
    wide_stores: int
    local: int


def architecture_number(name: str) -> int:
    return newest_architecture() if name == "newest" else int(name)


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names and how a person writes them, without namespace and parameters."""
    mangled = list(names)
    done = subprocess.run([tool("c++filt")], input="\n".join(mangled), capture_output=True, text=True, check=True)
    lines = (line.removeprefix("void ").split("(")[0] for line in done.stdout.splitlines())
    return dict(zip(mangled, (line.replace("mx::", "") for line in lines), strict=True))


@cache
def resources(architecture: str) -> dict[str, Resources]:
    found: dict[str, Resources] = {}
    for code in device_code_of(kernel_sources(), architecture_number(architecture)):
        report = Path(f"{code}.log").read_text(encoding="utf-8")
        found |= parse_report(report)
    names = readable(found)
    return {names[name]: each for name, each in found.items()}


def parse_report(report: str) -> dict[str, Resources]:
    """Kernels of one report of ``ptxas -v``, by mangled name."""
    found = {}
    entries = list(_ENTRY.finditer(report))
    ends = [entry.start() for entry in entries[1:]] + [len(report)]
    for entry, end in zip(entries, ends, strict=True):
        text = report[entry.start() : end]
        spills, registers = _SPILLS.search(text), _REGISTERS.search(text)
        assert spills is not None, text
        assert registers is not None, text
        found[entry[1]] = Resources(int(registers[1]), int(spills[1]), int(spills[2]) + int(spills[3]))
    return found


def disassembler() -> Path:
    """nvdisasm: on PATH, or of the wheel nvidia-cuda-nvdisasm."""
    try:
        return tool("nvdisasm")
    except CannotBuildError:
        places = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/**/bin/nvdisasm"))
        if not places:
            raise CannotBuildError("nvdisasm is not on PATH, nor installed by nvidia-cuda-nvdisasm") from None
        return places[-1]


@cache
def accesses(architecture: str) -> dict[str, Accesses]:
    """Memory instructions of each kernel, by readable name."""
    program = disassembler()
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    codes = device_code_of(kernel_sources(), architecture_number(architecture))
    listings = make([Step(f"{program} -c $in > $out", (code,), ".sass", version) for code in codes])
    found: dict[str, Accesses] = {}
    for listing in listings:
        found |= parse_listing(listing.read_text(encoding="utf-8"))
    names = readable(found)
    return {names[name]: each for name, each in found.items()}


def parse_listing(listing: str) -> dict[str, Accesses]:
    """Kernels of one listing of ``nvdisasm``, by mangled name."""
    found = {}
    sections = list(_SECTION.finditer(listing))
    ends = [section.start() for section in sections[1:]] + [len(listing)]
    for section, end in zip(sections, ends, strict=True):
        text = listing[section.end() : end]
        wide = [each for each in _GLOBAL_ACCESS.findall(text) if "128" in each or "256" in each]
        loads = sum(each.startswith("LDG") for each in wide)
        found[section[1]] = Accesses(loads, len(wide) - loads, len(_LOCAL_ACCESS.findall(text)))
    return found


TABLE = Path(__file__).with_name("table.json")
# Devices give registers to a thread in units of 8: fewer in a unit change nothing.
UNIT = 8


@dataclass(frozen=True)
class Limits:
    """A kernel's ceiling of registers on any architecture, and whether it reads and writes 16 bytes at once."""

    registers: int
    wide_loads: bool
    wide_stores: bool


def read_table() -> dict[str, Limits]:
    return {name: Limits(**values) for name, values in json.loads(TABLE.read_text(encoding="utf-8")).items()}


def limits_of(taken: list[Resources], accessed: list[Accesses], before: Limits | None) -> Limits:
    """Limits that fit what a kernel takes on each architecture. What was wide stays so, until a person takes it out."""
    registers = max(each.registers for each in taken)
    return Limits(
        registers=-(-registers // UNIT) * UNIT,
        wide_loads=all(each.wide_loads for each in accessed) or (before is not None and before.wide_loads),
        wide_stores=all(each.wide_stores for each in accessed) or (before is not None and before.wide_stores),
    )


def rewrite_table() -> None:
    before = read_table() if TABLE.exists() else {}
    taken = [resources(architecture) for architecture in ARCHITECTURES]
    accessed = [accesses(architecture) for architecture in ARCHITECTURES]
    limits = {
        name: limits_of([each[name] for each in taken], [each[name] for each in accessed], before.get(name))
        for name in sorted(taken[0])
    }
    lines = (f"  {json.dumps(name)}: {json.dumps(asdict(each))}" for name, each in limits.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
