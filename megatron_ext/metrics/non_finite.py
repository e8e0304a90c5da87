"""Numbers that JSON cannot write, taken out of a line and put back.

Places are spelled ``name`` for a value of the line and ``name[key][0]`` for one inside of it.
"""

import math
from collections.abc import Iterator, Mapping

NESTED = frozenset({"position_loss", "adam_var"})
"""Values of a line that hold numbers inside; others are not searched, for some are long."""


def take_out(line: dict[str, object]) -> dict[str, str]:
    """Replace what is not finite by None, in place (containers are copied), and return place -> spelling."""
    spelled: dict[str, str] = {}
    for name, value in line.items():
        if isinstance(value, float) and not math.isfinite(value):
            spelled[name] = str(value)
            line[name] = None
        elif name in NESTED and value is not None:
            inside = {place: str(number) for place, number in _non_finite(value, name)}
            if inside:
                line[name] = _replaced(value, name, dict.fromkeys(inside))
                spelled.update(inside)
    return spelled


def put_back(line: Mapping[str, object], spelled: Mapping[str, str]) -> dict[str, object]:
    """The line with the numbers whose spelling ``take_out`` returned."""
    result = dict(line)
    numbers = {place: float(spelling) for place, spelling in spelled.items()}
    for place, number in numbers.items():
        name = place.partition("[")[0]
        if name == place:
            result[name] = number
        elif name in result:
            result[name] = _replaced(result[name], name, numbers)
    return result


def _items(value: object) -> list[tuple[object, object]]:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _non_finite(value: object, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    for key, item in _items(value):
        yield from _non_finite(item, f"{place}[{key}]")


def _replaced(value: object, place: str, by: Mapping[str, object]) -> object:
    """A copy of the value with what is at the places of ``by`` replaced."""
    if place in by:
        return by[place]
    if isinstance(value, Mapping):
        return {key: _replaced(item, f"{place}[{key}]", by) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, f"{place}[{index}]", by) for index, item in enumerate(value)]
    return value
