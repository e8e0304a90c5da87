"""What every section of a run config has in common, and the durations they share."""

from typing import Annotated, Final

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
    """A stretch of training: ``{"steps": n}`` or ``{"tokens": n}``, exactly one of the two."""

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
