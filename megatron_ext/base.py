"""What every section of a run config has in common, and the durations they share."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Whole numbers up to this are exact as floats too, which is how learning rates are computed from token counts.
MAX_COUNT: Final = 2**53

PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all config sections: immutable, unknown keys refused, no coercion of strings to numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class Duration(Section):
    """A part of training: ``{"steps": n}`` or ``{"tokens": n}``, exactly one of the two."""

    steps: PositiveInt | None = None
    """Optimizer steps."""

    tokens: PositiveInt | None = None
    """Tokens trained on, counted at the length that was really used (batch size times sequence length)."""

    @model_validator(mode="after")
    def _one_unit(self) -> "Duration":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError('a duration is {"steps": n} or {"tokens": n}, exactly one of them')
        return self

    def __str__(self) -> str:
        return f"{self.steps:,} steps" if self.steps is not None else f"{self.tokens:,} tokens"


def differences(one: Any, other: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two trees of JSON values differ, sorted, each with both values; None for a missing one.

    Objects are compared key by key, lists as a whole.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
    elif one != other:
        yield prefix, one, other


def describe_differences(there: Any, here: Any) -> str:
    """``differences`` in words."""
    found = differences(there, here)
    return "; ".join(f"{key} is {json.dumps(old)} there and {json.dumps(new)} here" for key, old, new in found)
