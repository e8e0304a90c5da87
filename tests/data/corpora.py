"""Small token files and run configs for the tests of datasets and loaders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.config.run import RunConfig
from megatron_ext.data.datasets import Datasets, Samples, build_datasets
from megatron_ext.data.token_files import TokenPaths
from megatron_ext.data.token_writer import TokenFileWriter

SEPARATOR = 0
VOCABULARY = 60_000


def documents(count: int, *, shortest: int = 3, longest: int = 40, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    """Documents whose ids count up, no id in two of them, each ended by the separator 0.

    So the token after any token is known from the token alone, except after a separator.
    """
    lengths = np.random.default_rng(seed).integers(shortest, longest, size=count)
    ends = np.cumsum(lengths)
    assert ends[-1] < VOCABULARY
    return [
        np.append(np.arange(end - length + 1, end + 1), SEPARATOR).astype(np.int32)
        for end, length in zip(ends, lengths, strict=True)
    ]


def write_tokens(prefix: Path, docs: Sequence[npt.NDArray[np.int32]], *, sidecar: bool = False) -> str:
    """Write token files as another tool would (without a sidecar), or as preprocess does; returns the prefix."""
    with TokenFileWriter(prefix, dtype=np.uint16) as writer:
        writer.add(np.concatenate(docs), np.array([len(doc) for doc in docs]))
        writer.commit(tokenizer="a.json", tokenizer_digest="d" * 64, vocab_size=VOCABULARY, eod=SEPARATOR)
    if not sidecar:
        TokenPaths.of(prefix).sidecar.unlink()
    return str(prefix)


def run_config(data: dict[str, Any], **sections: Any) -> RunConfig:
    """A run config over ``data``; sections are merged into small defaults."""
    tree: dict[str, Any] = {
        "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": VOCABULARY},
        "data": data,
        "training": {"seq_len": 16, "batch_size": 8, "duration": {"steps": 20}},
        "learning_rate": {"peak": 1e-3},
        "validation": {"samples": 5},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return RunConfig.model_validate_json(json.dumps(tree))


def build(config: RunConfig) -> Datasets:
    """The datasets of a whole run."""
    return build_datasets(
        config.data,
        seq_len=config.training.seq_len,
        vocab_size=config.model.vocab_size,
        samples=config.plan().samples,
        valid_samples=config.validation.samples,
        seed=config.seed,
    )


def whole(samples: Samples, index: int) -> npt.NDArray[np.integer[Any]]:
    """All seq_len + 1 tokens of a sample."""
    return samples.read(index, 0, samples.seq_len + 1)
