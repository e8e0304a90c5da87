"""Numbers as text: for people, and in JSON, which has no NaN and no infinity."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, as Python's escapes; lines and tabs stay."""
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def format_count(number: float) -> str:
    """A number of tokens or steps in four digits: 950, 9,999, 12.35K, 4.56M, 157.3B."""
    # 9,999.5 and 999,960 round to five digits: the next unit is theirs.
    if number < 9999.5:
        return f"{number:,.4g}" if number < 999.95 else f"{number:,.0f}"
    size, unit = next((size, unit) for size, unit in _UNITS if number >= size * 0.99995)
    return f"{number / size:.4g}{unit}"


def format_duration(seconds: float | None) -> str:
    """A time spent or left: 4.5 s, 1:05, 1:02:03, 3d 04:05, or ? where it is not known."""
    if seconds is None:
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def finite_or_none(value: float | None) -> float | None:
    """The value, or None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def spell_non_finite(value: Any) -> Any:
    """A JSON value in which "nan", "inf" and "-inf" stand for the numbers that are not finite; tuples become lists."""
    return _mapped(value, "", lambda _, item: str(item) if _is_non_finite(item) else item)


def take_out(line: dict[str, object], *, nested: Collection[str] = ()) -> dict[str, str]:
    """Replace what is not finite by None, in place, and return place -> spelling.

    A place is ``name`` for a value of the line and ``name[key][0]`` for one inside of it.

    Args:
        line: A JSON object.
        nested: Names of values that hold numbers inside (they are copied); others are not searched, some are long.
    """
    spelled: dict[str, str] = {}

    def change(place: str, value: object) -> object:
        if _is_non_finite(value):
            spelled[place] = str(value)
            return None
        return value

    for name, value in line.items():
        if isinstance(value, float) or name in nested:
            line[name] = _mapped(value, name, change)
    return spelled


def put_back(line: Mapping[str, object], spelled: Mapping[str, str]) -> dict[str, object]:
    """The line with the numbers whose spelling ``take_out`` returned; ValueError where one is no number."""
    result = dict(line)
    numbers = {place: float(spelling) for place, spelling in spelled.items()}
    for place, number in numbers.items():
        name = place.partition("[")[0]
        if name == place:
            result[name] = number
        elif name in result:
            result[name] = _mapped(result[name], name, numbers.get)
    return result


def _is_non_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _mapped(value: object, place: str, change: Callable[[str, object], object]) -> object:
    """A copy of a JSON value with ``change(place, value)`` for everything that is no container."""
    if isinstance(value, Mapping):
        return {key: _mapped(item, f"{place}[{key}]", change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, f"{place}[{index}]", change) for index, item in enumerate(value)]
    return change(place, value)
