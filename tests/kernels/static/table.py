"""The table of what each kernel may take, beside this file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.kernels.static.device_code import ARCHITECTURES, Accesses, Resources, accesses, resources

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
    """The table, by readable name of the kernel."""
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
    """Writes the table for the kernels as they are."""
    before = read_table() if TABLE.exists() else {}
    taken = [resources(architecture) for architecture in ARCHITECTURES]
    accessed = [accesses(architecture) for architecture in ARCHITECTURES]
    limits = {
        name: limits_of([each[name] for each in taken], [each[name] for each in accessed], before.get(name))
        for name in sorted(taken[0])
    }
    lines = (f"  {json.dumps(name)}: {json.dumps(asdict(each))}" for name, each in limits.items())
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
