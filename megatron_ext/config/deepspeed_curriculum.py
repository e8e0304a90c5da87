"""DeepSpeed's two curriculum blocks, written as our ``curriculum`` section.

Source: DeepSpeed's curriculum learning tutorial, sections 1.1 to 1.3 (``curriculum_learning``, removed from DeepSpeed
in 0.19.8), and its configuration page, "Data Efficiency" (``data_efficiency``).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

_FALLBACK = '{"pacing": "linear", "start": 8, "duration": {"steps": T}}'
_DEFAULT_MULTIPLE = 8
# DeepSpeed's data-efficiency metrics that are lengths, and what becomes of the rest of a sample.
_TAIL_OF_METRIC = {"seqlen_truncate": "truncate", "seqlen_reshape": "recycle"}


class _UntranslatableError(Exception):
    """The block says something that has no counterpart; the message is the reason."""


@dataclass(frozen=True)
class Translation:
    """A curriculum section, or None where there is none to write, and what else to know."""

    curriculum: dict[str, Any] | None
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.curriculum is None:
            return "; ".join(("remove it", *self.remarks))
        return "; ".join((f'write "curriculum": {json.dumps(self.curriculum)} instead', *self.remarks))


def translate_legacy(block: Any) -> Translation:
    """The ``curriculum_learning`` block of DeepSpeed up to 0.19.7 as our section."""
    try:
        return _translate(_object(block, "curriculum_learning"))
    except _UntranslatableError as reason:
        return Translation(None, (f"it cannot be translated because {reason}", f'write "curriculum": {_FALLBACK}'))


def translate_data_efficiency(block: Any) -> Translation:
    """The curriculum in a ``data_efficiency`` block as our section."""
    try:
        return _translate_metrics(_object(block, "data_efficiency"))
    except _UntranslatableError as reason:
        return Translation(None, (f"it cannot be translated because {reason}", f'write "curriculum": {_FALLBACK}'))


def _translate_metrics(block: dict[str, Any]) -> Translation:
    sampling = _object(block.get("data_sampling", {}), "data_sampling")
    learning = _object(sampling.get("curriculum_learning", {}), "curriculum_learning")
    metrics = _object(learning.get("curriculum_metrics", {}), "curriculum_metrics")
    off = any(part.get("enabled", False) is not True for part in (block, sampling, learning))
    if off or not metrics:
        return Translation(None, ("it turns on no curriculum",))
    lengths = {name: metric for name, metric in metrics.items() if name in _TAIL_OF_METRIC}
    if len(lengths) != 1 or len(metrics) != 1:
        raise _UntranslatableError(
            f"its metrics are {', '.join(metrics)}, and only the sequence length is a curriculum here"
        )
    [(name, metric)] = lengths.items()
    translated = _translate({"enabled": True, "curriculum_type": "seqlen", **_object(metric, name)})
    return Translation(translated.curriculum, (*translated.remarks, f'write "tail": "{_TAIL_OF_METRIC[name]}" in data'))


def _translate(block: dict[str, Any]) -> Translation:
    if block.get("enabled", False) is not True:
        return Translation(None, ("it is not enabled",))
    kind = block.get("curriculum_type", "seqlen")
    if kind != "seqlen":
        raise _UntranslatableError(
            f"curriculum_type is {json.dumps(kind)}, and only the sequence length is a curriculum here"
        )
    schedule = _object(block.get("schedule_config", {}), "schedule_config")
    match block.get("schedule_type"):
        case "fixed_linear":
            return _growing(block, schedule, {"pacing": "linear"})
        case "fixed_root":
            return _growing(block, schedule, {"pacing": "root", "degree": _positive(schedule, "root_degree")})
        case "fixed_discrete":
            return _discrete(schedule)
        case other:
            raise _UntranslatableError(
                f"schedule_type is {json.dumps(other)}, not fixed_linear, fixed_root or fixed_discrete"
            )


def _growing(block: dict[str, Any], schedule: dict[str, Any], pacing: dict[str, Any]) -> Translation:
    lowest, highest = _positive(block, "min_difficulty"), _positive(block, "max_difficulty")
    multiple = _positive(schedule, "difficulty_step")
    start, end = -(-lowest // multiple) * multiple, highest // multiple * multiple
    if start > end:
        raise _UntranslatableError(f"there is no multiple of difficulty_step {multiple} between {lowest} and {highest}")
    remarks = [
        f"{key} {old} is no multiple of difficulty_step {multiple} and became {new}"
        for key, old, new in (("min_difficulty", lowest, start), ("max_difficulty", highest, end))
        if old != new
    ]
    duration = {"steps": _positive(schedule, "total_curriculum_step")}
    return Translation(
        {**pacing, "start": start, "end": end, "multiple": multiple, "duration": duration}, tuple(remarks)
    )


def _discrete(schedule: dict[str, Any]) -> Translation:
    lengths, switches = _numbers(schedule, "difficulty"), _numbers(schedule, "max_step")
    if len(lengths) != len(switches) + 1 or not switches:
        raise _UntranslatableError(
            f"difficulty has {len(lengths)} entries and max_step {len(switches)}, where max_step takes one less"
        )
    begins = [0, *switches[:-1]]
    durations = [end - begin for begin, end in zip(begins, switches, strict=True)]
    if min(durations) <= 0:
        raise _UntranslatableError(f"max_step {switches} does not rise")
    stages = [
        {"seq_len": length, "duration": {"steps": steps}} for length, steps in zip(lengths[:-1], durations, strict=True)
    ]
    multiple = math.gcd(*lengths[:-1], _DEFAULT_MULTIPLE)
    return Translation(
        {"pacing": "discrete", "stages": stages, "multiple": multiple},
        (f"the last length, {lengths[-1]}, is training.seq_len",),
    )


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UntranslatableError(f"{name} is {json.dumps(value)}, not an object")
    return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(block: dict[str, Any], key: str) -> int:
    value = block.get(key)
    if not _is_positive(value):
        raise _UntranslatableError(f"{key} is {json.dumps(value)}, not a positive whole number")
    assert isinstance(value, int)
    return value


def _numbers(block: dict[str, Any], key: str) -> list[int]:
    values = block.get(key)
    if not isinstance(values, list) or not all(_is_positive(value) for value in values):
        raise _UntranslatableError(f"{key} is {json.dumps(values)}, not a list of positive whole numbers")
    return values
