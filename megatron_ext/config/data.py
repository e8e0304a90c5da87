"""The data section: which token files, which tokenizer, in what order."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class DataSource(Section):
    """One tokenized corpus of a blend."""

    prefix: str
    """Path of PREFIX.bin and PREFIX.idx, as ``megatron-ext preprocess`` writes them, without the extension."""

    weight: PositiveFloat = 1.0
    """Share of the samples in relation to the other sources' weights."""


Sources = Annotated[tuple[DataSource, ...], Field(min_length=1)]


class DataConfig(Section):
    """Token files: either ``sources`` cut by ``split``, or ``train`` and ``valid`` given apart."""

    sources: Sources | None = None
    """Corpora that are split into train, validation and test by ``split``."""

    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (949.0, 50.0, 1.0)
    """Shares of train, validation and test documents in ``sources``."""

    train: Sources | None = None
    """Corpora for training alone; then ``valid`` is needed too and ``sources`` is not given."""

    valid: Sources | None = None
    """Corpora for validation alone."""

    tokenizer: str = "gpt2"
    """``gpt2`` (needs the installed vocabulary package) or the path of a tokenizers JSON file; must be the one that the
    token files were written with."""

    tail: Literal["truncate", "recycle"] = "truncate"
    """What happens to the rest of a sample when a step is shorter: dropped, as in the paper, or used by later steps."""

    index_cache: str | None = None
    """Directory of the sample index; by default ``index_cache`` beside the first source."""

    prefetch: NonNegativeInt = 4
    """Steps whose batches are prepared ahead by a background thread; 0 prepares them in the step."""
