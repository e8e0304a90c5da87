"""Numbers for people and in JSON."""

import json
import math

import pytest

from megatron_ext.text import finite_or_none, format_count, format_duration, spell_non_finite


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(0, "0"), (1.234, "1.234"), (950, "950"), (452.5483, "452.5"), (1984, "1,984"), (9999.4, "9,999")],
        *[(10_000, "10K"), (12_345, "12.35K"), (999_960, "1M"), (3e6, "3M"), (157.2864e9, "157.3B"), (2e16, "2e+04T")],
    ],
)
def test_counts_for_people(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(None, "?"), (0.44, "0.4 s"), (59.94, "59.9 s"), (59.96, "1:00"), (3723, "1:02:03"), (86399.6, "1d 00:00")],
        (3 * 86400 + 4 * 3600 + 300, "3d 04:05"),
    ],
)
def test_durations_for_people(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_json_of_what_is_not_finite() -> None:
    value = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": None}}
    spelled = spell_non_finite(value)
    assert spelled == {"a": [1.5, "nan", ["inf", "x"]], "b": {"c": "-inf", "d": None}}
    assert json.loads(json.dumps(spelled, allow_nan=False)) == spelled
    assert [finite_or_none(item) for item in (1.5, math.nan, math.inf, None)] == [1.5, None, None, None]
