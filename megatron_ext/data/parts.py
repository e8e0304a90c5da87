"""Which documents of which corpus a run trains and validates on, checked before anything is built on them.

Imports no torch, so that what is wrong with the data is told before there are ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from megatron_ext.config.data import DataConfig, DataSource
from megatron_ext.config.run import RunConfig
from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.sources import TokenSource, check_tokens, open_source
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import UserError

Use = Literal["train", "valid"]

_PLACES: Final[dict[Use, int]] = {"train": 0, "valid": 1}
"""Where a use's share stands in ``data.split``."""


@dataclass(frozen=True)
class Part:
    """A run of documents of one corpus, for training or for validation."""

    source: TokenSource
    first: int
    end: int
    weight: float
    use: Use

    @property
    def tokens(self) -> int:
        """Tokens of its documents."""
        return self.source.tokens_between(self.first, self.end)

    def samples(self, seq_len: int) -> int:
        """Whole samples in one pass; the last token of each is the first one of the next."""
        return (self.tokens - 1) // seq_len


def check_data(config: RunConfig) -> None:
    """Find what is wrong with the data of a run, as every rank would.

    Raises:
        UserError: files missing, damaged or of another tokenizer; ids beyond model.vocab_size; too little data for one
            sample of ``training.seq_len + 1`` tokens in training or validation; index cache not writable.
    """
    open_parts(config, ("train", "valid"), index_cache(config))


def index_cache(config: RunConfig) -> IndexCache:
    """Where a run keeps its index: ``data.index_cache``, by default beside its first corpus."""
    if config.data.index_cache is not None:
        return IndexCache(Path(config.data.index_cache))
    first = _entries(config.data, "train")[0]
    return IndexCache(Path(first.prefix).parent / "index_cache")


def _entries(data: DataConfig, use: Use) -> Sequence[DataSource]:
    entries = data.sources or (data.train if use == "train" else data.valid)
    assert entries, "checked with the config"
    return entries


def open_parts(config: RunConfig, uses: Sequence[Use], cache: IndexCache) -> list[list[Part]]:
    """The documents of each use, every corpus opened and checked once. Raises as :func:`check_data` does."""
    data, vocab_size, seq_len = config.data, config.model.vocab_size, config.training.seq_len
    prefixes = dict.fromkeys(entry.prefix for use in uses for entry in _entries(data, use))
    opened = {prefix: open_source(prefix) for prefix in prefixes}
    described = any(source.sidecar for source in opened.values())
    tokenizer = load_tokenizer(data.tokenizer) if described else None
    for source in opened.values():
        check_tokens(source, tokenizer=tokenizer, vocab_size=vocab_size, cache=cache)
    parts: list[list[Part]] = []
    for use in uses:
        parts.append([])
        for entry in _entries(data, use):
            source = opened[entry.prefix]
            first, end = _share(source.documents, data.split, use) if data.sources else (0, source.documents)
            part = Part(source=source, first=first, end=end, weight=entry.weight, use=use)
            _check_part(part, seq_len=seq_len, split=data.split if data.sources else None)
            parts[-1].append(part)
    return parts


def _share(documents: int, split: tuple[float, float, float], use: Use) -> tuple[int, int]:
    """Documents [first, end) of a use, with megatron-core's rounding."""
    place = _PLACES[use]
    edges = np.cumsum([0.0, *split]) / sum(split)
    return round(edges[place] * documents), round(edges[place + 1] * documents)


def _check_part(part: Part, *, seq_len: int, split: tuple[float, float, float] | None) -> None:
    if part.samples(seq_len) > 0:
        return
    prefix, use, total = part.source.prefix, part.use, part.source.documents
    shares = f" of {total:,} under data.split {list(split)}" if split else ""
    remedy = "give data.split another share or name more data" if split else "name more data"
    raise UserError(
        f"data source {prefix}: its {part.end - part.first:,} {use} documents{shares} hold {part.tokens:,} tokens, "
        f"less than one sample of training.seq_len + 1 = {seq_len + 1:,}; lower training.seq_len, {remedy}"
    )
