"""What was measured of one case, the figures that follow from it, and their table. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.ops.bench.traffic import Case, traffic

FUSED = "fused"


@dataclass(frozen=True)
class Measured:
    """Median seconds of each contestant, "fused" among them, and why others could not run."""

    case: Case
    forward: Mapping[str, float]
    both: Mapping[str, float]
    """Forward and backward; empty where there is no backward."""

    failures: Mapping[str, str]


@dataclass(frozen=True)
class Figures:
    """The figures of one case and direction ("forward", "backward"), of the fused kernel."""

    case: Case
    direction: str
    microseconds: float
    gigabytes_per_second: float
    share_of_copy: float
    """Of the rate at which the device copies."""

    ratios: Mapping[str, float]
    """How many times as long each other contestant took; for the backward, forward and backward together."""


def figures(measured: Measured, *, copy_bytes_per_second: float) -> list[Figures]:
    """The figures of both directions.

    The backward's time is what forward and backward take together less what the forward takes.
    """
    moved = traffic(measured.case)
    result = [_figures(measured, "forward", measured.forward, (measured.forward[FUSED], moved.forward))]
    if measured.both:
        seconds = measured.both[FUSED] - measured.forward[FUSED]
        result.append(_figures(measured, "backward", measured.both, (seconds, moved.backward)))
    return [_shared(one, copy_bytes_per_second) for one in result]


def _figures(measured: Measured, direction: str, seconds: Mapping[str, float], fused: tuple[float, int]) -> Figures:
    taken, moved = fused
    rate = moved / taken / 1e9 if taken > 0 else float("nan")
    ratios = {name: value / seconds[FUSED] for name, value in seconds.items() if name != FUSED}
    return Figures(measured.case, direction, 1e6 * taken, rate, float("nan"), ratios)


def _shared(one: Figures, copy_bytes_per_second: float) -> Figures:
    share = one.gigabytes_per_second * 1e9 / copy_bytes_per_second
    return Figures(one.case, one.direction, one.microseconds, one.gigabytes_per_second, share, one.ratios)


def table(rows: Sequence[Figures]) -> str:
    """The figures as lines of text, aligned."""
    names = list(dict.fromkeys(name for row in rows for name in row.ratios))
    lines = [["operation", "direction", "us", "GB/s", "of copy", *(f"/ {name}" for name in names)]]
    for row in rows:
        ratios = [f"{row.ratios[name]:.2f}x" if name in row.ratios else "-" for name in names]
        numbers = [f"{row.microseconds:.1f}", f"{row.gigabytes_per_second:.1f}", f"{100 * row.share_of_copy:.0f}%"]
        lines.append([str(row.case), row.direction, *numbers, *ratios])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_json(
    measured: Sequence[Measured], rows: Sequence[Figures], *, copy_bytes_per_second: float, device: str
) -> dict[str, Any]:
    """Everything, as JSON values."""
    return {
        "device": device,
        "copy_gigabytes_per_second": copy_bytes_per_second / 1e9,
        "figures": [asdict(row) for row in rows],
        "measured": [asdict(one) for one in measured],
    }
