"""The data section: which token files, which tokenizer, in what order."""

from collections.abc import Iterator
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

    def problems(self) -> Iterator[str]:
        """What contradicts in the choice of token files and how they are split."""
        apart = [name for name in ("train", "valid") if getattr(self, name) is not None]
        if self.sources is None:
            if not apart:
                yield (
                    'data names no token files: write data.sources [{"prefix": "PREFIX"}], to be split by data.split, '
                    "or data.train and data.valid"
                )
            if len(apart) == 1:
                other = "valid" if apart == ["train"] else "train"
                yield f"data.{apart[0]} is given without data.{other}: write data.{other} too, or data.sources instead"
            return
        if apart:
            keys = " and ".join(f"data.{name}" for name in apart)
            yield f"data.sources and {keys} are both given: remove data.sources (or set it to null), or remove {keys}"
        for share, name in zip(self.split[:2], ("training", "validation"), strict=True):
            if share == 0:
                yield (
                    f"data.split is {list(self.split)}, which leaves nothing for {name}: write for example [949, 50, 1]"
                )
